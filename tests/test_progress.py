import io
import re

import pytest

from hf_rb.utils import progress


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.1)


def slowly(bar, clock, seconds):
    for one in bar:
        clock[0] += seconds
        yield one


def test_a_log_gets_few_whole_lines(capsys):
    clock = [0.0]
    bar = progress.tqdm(range(20), desc="perplexity", unit="window", delay=2, leave=False, disable=None)
    bar._time, bar.start_t, bar.last_print_t = lambda: clock[0], 0.0, 0.0
    assert list(slowly(bar, clock, 0.03)) == list(range(20))
    written = capsys.readouterr().err
    lines = written.splitlines()
    assert 3 <= len(lines) <= 6 and "\r" not in written
    assert all(re.match(r"perplexity: \d+ of 20 \(\d+%\), 00:00 so far, about ", line) for line in lines)


def test_short_work_and_what_is_switched_off_say_nothing(capsys):
    with progress.tqdm(total=3, desc="write", unit="B", unit_scale=True, disable=None) as bar:
        bar.update(3)
        bar.set_postfix_str("x", refresh=False)
    list(progress.tqdm(range(5), disable=True))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    list(progress.tqdm(range(5), desc="write", disable=None))
    assert "\r" in terminal.getvalue() and "write: 100%" in terminal.getvalue()
