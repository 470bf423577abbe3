"""`hf-rb doctor`: what it finds on what is installed, and what it says where something is wrong."""

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from hf_rb.cli import main
from hf_rb.scripts import doctor
from hf_rb.scripts.doctor.findings import Skipped, finding_of, public
from hf_rb.utils import compat, versions


def doctors_json(capsys):
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def no_trials(monkeypatch):
    """The doctor without what runs a model."""
    from hf_rb.scripts.doctor import trials

    for name in ("quantization_trials", "adapter_trials", "training_trials"):
        monkeypatch.setattr(trials, name, lambda: iter(()))
    monkeypatch.setattr(doctor.behaviours, "behaviours", lambda: [])


def test_doctor_on_what_is_installed_finds_nothing_wrong(capsys):
    code, report = doctors_json(capsys)
    failed = [one for one in report["verdicts"] if one["state"] == "failed"]
    assert (failed, code) == ([], 0)
    groups = {one["group"] for one in report["verdicts"]}
    assert groups == {"versions", "imports", "registration", "quantization", "adapters", "training", "behaviour"}
    assert sum(one["group"] == "training" for one in report["verdicts"]) == 4
    skipped = [one["detail"] for one in report["verdicts"] if one["state"] == "skipped"]
    assert all(detail == compat.native_adapters_problem() for detail in skipped)
    text = json.dumps(report)
    assert not [folder for folder in (sys.prefix, str(Path.home()) + os.sep, tempfile.gettempdir()) if folder in text]
    assert report["versions"]["transformers"] == metadata.version("transformers")
    assert {"python", "torch", "trl", "peft", "accelerate", "datasets", "optimum", "triton", "vllm", "C compiler", "devices"} <= (
        report["versions"].keys()
    )  # fmt: skip


def test_doctor_with_an_unsupported_version_says_the_range(capsys, monkeypatch):
    monkeypatch.setattr(versions, "_supported", False)
    monkeypatch.setattr(versions.metadata, "version", lambda name: "4.57.1" if name == "transformers" else "99.0")
    monkeypatch.setattr(versions, "RANGES", {"transformers": ("5.23", "6")})
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert (
        "FAILED  ranges of transformers, TRL, PEFT and accelerate: UnsupportedVersion: hf_rb needs transformers>=5.23,<6"
        in output
    )
    assert output.rstrip().endswith("0 passed, 1 failed, 0 skipped, 0 s")


def test_doctor_with_a_moved_name_says_its_name_and_fails(capsys, monkeypatch, no_trials):
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("trl.trainer.utils", "no_such_function"))
    code, report = doctors_json(capsys)
    (failed,) = [one for one in report["verdicts"] if one["state"] == "failed"]
    assert code == 1 and failed["name"] == "moved" and "`trl.trainer.utils.no_such_function`" in failed["detail"]


def test_doctor_with_another_behaviour_names_what_relies_on_it(capsys, monkeypatch, no_trials):
    def check():
        raise RuntimeError(f"{Path.home() / 'models'} is gone.")

    behaviour = doctor.behaviours.Behaviour(("rename_source_key",), "Keys are renamed", check)
    monkeypatch.setattr(doctor.behaviours, "behaviours", lambda: [behaviour])
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "FAILED  Keys are renamed: RuntimeError: " in output and "in the table as rename_source_key" in output
    assert str(Path.home() / "models") not in output


def test_a_finding_keeps_quiet_about_what_a_library_prints(capsys):
    finding = finding_of("training", "loud", lambda: print("noise"))
    assert finding.state == "passed" and capsys.readouterr() == ("", "")
    skipped = finding_of("adapters", "absent", lambda: (_ for _ in ()).throw(Skipped("needs peft 0.22")))
    assert (skipped.state, skipped.detail) == ("skipped", "needs peft 0.22")


def test_a_trial_run_that_fails_trains_once(monkeypatch):
    from hf_rb.scripts.doctor.behaviours import trainers

    made = []

    def broken(options):
        made.append(options)
        raise RuntimeError("moved")

    monkeypatch.setitem(trainers.TRAINERS, "BrokenTrainer", broken)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="moved"):
            trainers.trial_run("BrokenTrainer")
    assert len(made) == 1


def test_doctor_skips_names_of_a_module_that_trl_removed(monkeypatch):
    from hf_rb.scripts.doctor.behaviours import check_parameters

    for gone in ("trl.experimental.gkd", "trl.experimental"):  # the module, and the package that it was in
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "trl.experimental.gkd", raising=False)
            patch.setitem(sys.modules, gone, None)
            finding = finding_of("names", "GKDTrainer", lambda: check_parameters("GKDTrainer"))
        assert finding.state == "skipped" and "This TRL has no trl.experimental.gkd" in finding.detail


def test_public_texts_have_no_folders_of_this_machine():
    import torch

    text = public(f"File {torch.__file__} in {Path.cwd()}, {tempfile.gettempdir()}/tmpx and {Path.home()}/.cache")
    assert "torch" in text and "site-packages>" in text or "<path>" in text
    assert not [one for one in (str(Path(torch.__file__).parent), tempfile.gettempdir() + "/") if one in text]
