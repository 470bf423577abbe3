"""Stages are done once, again where something changed, and go on where they were."""

import pytest

from hf_rb.recover.stages import Stages


@pytest.fixture
def stages(tmp_path):
    said = []
    one = Stages(tmp_path, said.append)
    one.said = said
    return one


def test_a_stage_is_done_once(stages):
    done = []

    def work(folder):
        done.append(folder)
        (folder / "result").write_text("1")

    folder = stages.run("one", {"a": 1}, work)
    assert stages.run("one", {"a": 1}, work) == folder and done == [folder]
    assert stages.said[-1] == "one: done before"
    stages.run("one", {"a": 2}, work)
    assert len(done) == 2 and "one, again (a changed) …" in stages.said


def test_what_was_changed_or_lost_is_done_again(stages):
    def work(folder):
        (folder / "result").write_text("1")

    folder = stages.run("one", {}, work)
    (folder / "result").write_text("2")
    stages.run("one", {}, work)
    assert (folder / "result").read_text() == "1"


def test_an_interrupted_stage_goes_on_in_its_folder(stages):
    def stopped(folder):
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    def rest(folder):
        (folder / "result").write_text(
            (folder / "half").read_text() if (folder / "half").exists() else "from the beginning"
        )

    for inputs, expected in (({"a": 1}, "1"), ({"a": 2}, "from the beginning")):
        with pytest.raises(KeyboardInterrupt):
            stages.run("one", {"a": 1}, stopped)
        folder = stages.run("one", inputs, rest)
        assert (folder / "result").read_text() == expected
        (folder / "manifest.json").unlink()
