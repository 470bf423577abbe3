import json
import logging
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_rb.advantages import edas
from hf_rb.advantages.edas import error_classes
from hf_rb.rl import answers, math_process
from hf_rb.rl.answers import math_equivalent, require_math_verify, same_answer
from hf_rb.rl.rewards import math_accuracy_reward


needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="needs math-verify")
TOWER = r"9^{9^{9^{9}}}"

SAME = [
    ("1,080", "1080"),
    ("1{,}080", "1080"),
    (r"1\,080", "1080"),
    ("12,345,678.50", "12345678.5"),
    ("$18", "18"),
    (r"\$18", 18),
    ("$18$", "18"),
    ("18 €", "€18.00"),
    ("-$18", "$-18"),
    ("\u22123", "-3"),
    ("18.", "18"),
    ("18.00", 18),
    (".5", "0.50"),
    (7.0, "7"),
    (1e-05, "0.00001"),
    (True, "true"),
    ("50%", "50.0 %"),
    (" Paris", "paris "),
    (r"\text{Paris}", "Paris"),
    ("A.", "A"),
    ("5 cm", r"5\text{ cm}"),
    (r"\frac{1}{2}", r"\frac{1}{2}"),
]
DIFFERENT = [
    ("1,2", "12"),
    ("12,34", "1234"),
    ("0,080", "80.5"),
    ("8", "80"),
    ("$18", "€18"),
    ("5", "-5"),
    ("listen", "silent"),
    ("cat", "act"),
    ("no", "on"),
    ("Alice beat Bob", "Bob beat Alice"),
    ("12 cups", "12 pens"),
    ("seven", "7"),
    # Arithmetic would find these equal, or have them differ by a unit that it leaves out.
    ("5 km", "5 m"),
    ("5 cm", "5 m"),
    ("5 m^2", "5 m"),
    ("1/2 m", "1/2 s"),
    ("25¢", "$25"),
    ("25 cents", "$25"),
    ("50%", "$50"),
    ("2020-03-01", "2020-01-03"),
    ("2020-01-02", "2017"),
    ("1/2/2020", "1/4040"),
    ("9:00", "10:00"),
    ("1:05", "2:10"),
    ("1:1:2", "1:2"),
    ("192.168.0.1", "192.168.0.2"),
    ("0x10", "0"),
    ("2 3", "5"),
    ("0.0000001", "0.0000002"),
    ("", ""),
    (None, None),
    (None, "None"),
    (float("nan"), "nan"),
]


@pytest.mark.parametrize("installed", [True, False], ids=["with math-verify", "without"])
@pytest.mark.parametrize("first, second, same", [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_texts_and_numbers(first, second, same, installed, monkeypatch):
    """The same with and without math-verify, in both directions."""
    if installed and find_spec("math_verify") is None:
        pytest.skip("needs math-verify")
    if not installed:
        monkeypatch.setattr(answers, "find_spec", lambda name: None)
    assert same_answer(first, second) is same and same_answer(second, first) is same


@pytest.mark.parametrize(
    "first, second",
    [
        ("3/4", "0.75"),
        (r"\frac{1}{2}", "0.5"),
        ("1,2", "(1,2)"),
        ("50%", "50"),
        ("50%", "1/2"),
        ("x=5", "5"),
        ("5 apples", "5"),
        ("2x", "x*2"),
        ("2x^2", "2x^{2}"),
        ("1:2", "1/2"),
        ("4-1", "3"),
        ("0.333333", "0.33333333"),
        ("x and y", "y and x"),
        ("1, 2", "1,2"),
        ("3, 5, 7", "3,5,7"),
        ("1.5, 2", "1.5,2"),
        (r"\{1,2\}", "1, 2"),
    ],
)
def test_what_math_verify_adds(first, second, monkeypatch):
    if find_spec("math_verify") is not None:
        assert same_answer(first, second) and same_answer(second, first)
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    assert not same_answer(first, second)


@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{:,}", "{:,}.", "${}", "{}00"]))
def test_every_spelling_of_a_number(number, spelling):
    number = number.to_integral_value() if spelling == "{:,}." else number
    text = spelling.format(abs(number))
    assert same_answer(text, abs(float(number)) if number == 0 else f"{abs(number):f}")
    assert not same_answer(text, f"{abs(number) + 1:f}")


@pytest.mark.parametrize("value", [["5"], ("5",), {"a": 5}, b"5"])
def test_what_is_no_answer(value):
    with pytest.raises(TypeError, match="An answer is text or a number, and .* is of type"):
        same_answer("5", value)


def test_classes_of_edas():
    found = ["1,080", "1080", "$1,080.00", "Paris", "9"]
    classes, _ = error_classes(found, [True] * 5, 5, equivalent=same_answer)
    assert classes[0] == classes[1] == classes[2] and len(set(classes)) == 3
    import torch

    advantages = torch.full((5,), -1.0)
    shaped = edas(advantages, 5, [False] * 5, found, equivalent=same_answer)
    torch.testing.assert_close(shaped, edas(advantages, 5, [False] * 5, ["a", "a", "a", "b", "c"]))


# The process of math-verify


@needs_math_verify
class TestWorker:
    @pytest.fixture(autouse=True)
    def forgotten(self):
        """No answer is known from another test."""
        math_process._read.cache_clear()
        math_process._equal.cache_clear()

    @pytest.fixture
    def quick(self, monkeypatch):
        """The same in less time."""
        monkeypatch.setattr(math_process, "SECONDS", 1.0)

    @pytest.mark.parametrize("in_thread, seconds", [(True, 5.0), (False, 1.0)], ids=["thread", "main thread"])
    def test_a_tower_of_powers_costs_its_time(self, in_thread, seconds, caplog, monkeypatch):
        assert math_process.SECONDS == 5
        monkeypatch.setattr(math_process, "SECONDS", seconds)
        require_math_verify("this test")  # starts the process, which is no part of the time
        rewards, start = [], time.monotonic()

        def score():
            rewards.extend(math_accuracy_reward([rf"\boxed{{{TOWER}}}"], ["5"]))

        with caplog.at_level(logging.WARNING):
            if in_thread:
                thread = threading.Thread(target=score, daemon=True)
                thread.start()
                thread.join(30)
            else:
                score()
        assert rewards == [0.0]
        assert seconds <= time.monotonic() - start < 10
        (message,) = [record.getMessage() for record in caplog.records]
        assert message == (f"math-verify has no reply after {seconds:.0f} s, so different from all others: {TOWER!r}")

    def test_it_is_paid_once_and_long_answers_are_not_printed(self, quick, caplog):
        long = "(" * 5000 + "1" + ")" * 5000 + TOWER
        start = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert not any(same_answer(long, str(number)) for number in range(50))
        assert time.monotonic() - start < 6
        (message,) = [record.getMessage() for record in caplog.records]
        assert len(message) <= 200 and "…" in message
        assert same_answer(r"\frac{2}{4}", "0.5")  # in a new process

    def test_answers_that_break_a_parser_are_different(self, quick):
        for answer in ("}{", r"\frac{}{}", "\ud800", "\x00", "\n", '"', "$$", r"\begin{array}", "{" * 300):
            assert not same_answer(answer, "7.5")
        assert math_equivalent("1<x<2", "(1,2)") and math_equivalent("(1,2)", "1<x<2")

    def test_a_process_that_somebody_ended_is_started_again(self):
        require_math_verify("this test")
        process = math_process._worker.process
        process.kill()
        assert same_answer(r"\frac{3}{4}", "0.75")
        assert math_process._worker.process is not process
        process = math_process._worker.process
        threading.Timer(0.2, process.kill).start()
        assert same_answer(r"\frac{3}{5}", "0.6")

    def test_threads_share_it(self):
        found = {}
        pairs = [(rf"\frac{{{n}}}{{2}}", f"{n / 2}") for n in range(3, 41)]
        threads = [threading.Thread(target=lambda p=p: found.update({p: same_answer(*p)})) for p in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == dict.fromkeys(pairs, True)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_has_its_own(self):
        program = """
import os
from hf_rb.rl import math_process
from hf_rb.rl.answers import same_answer
assert same_answer(r"\\frac{1}{2}", "0.5")
mine = math_process._worker.process.pid
math_process._worker.lock.acquire()  # as if another thread were asking
child = os.fork()
if child == 0:
    same = same_answer(r"\\frac{3}{4}", "0.75")
    other = math_process._worker.process.pid
    math_process._worker.stop()
    os._exit(0 if same and other != mine else 1)
math_process._worker.lock.release()
assert os.waitpid(child, 0)[1] == 0
assert same_answer(r"\\frac{3}{5}", "0.6") and math_process._worker.process.pid == mine
print(mine)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert found.returncode == 0 and found.stderr == ""
        with pytest.raises(ProcessLookupError):
            os.kill(int(found.stdout), 0)  # ended with the process that started it

    def test_it_imports_nothing_of_ours(self, monkeypatch):
        modules = "import sys, hf_rb.rl.math_worker as w, io; sys.stdin = io.StringIO(); w.main();"
        modules += "print(*sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)), file=sys.__stdout__)"
        output = subprocess.check_output([sys.executable, "-c", modules], text=True, timeout=120)
        assert output == "ready\n\n"

    def test_one_that_cannot_be_started(self, monkeypatch, tmp_path, caplog):
        """Nothing waits, nothing is asked in this process: texts and numbers are compared, and what needs more says so."""
        (tmp_path / "math_verify.py").write_text("raise RuntimeError")
        worker = math_process._Worker()
        monkeypatch.setattr(math_process, "_worker", worker)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        math_process._unasked.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert not same_answer(r"\frac{1}{2}", "0.5") and not same_answer(r"\frac{1}{3}", "0.5")
        (record,) = caplog.records
        assert (
            "Answers are compared as texts and numbers only, without math-verify: the process ended"
            in record.getMessage()
        )
        assert same_answer("1,080", 1080)
        message = "`this test` needs math-verify, which runs in a process of its own. That failed: the process"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                require_math_verify("this test")
        assert worker.failed_starts == math_process.MAX_FAILED_STARTS

    def test_lines_are_json(self):
        """The protocol, as the script speaks it."""
        script = math_process.Path(math_process.__file__).with_name("math_worker.py")
        asked = [
            {"what": "equal", "answers": ["1/2", "0.5"], "seconds": 5},
            {"what": "equal", "answers": ["1/2", "0.6"], "seconds": 5},
            {"what": "read", "answers": [""], "seconds": 5},
        ]
        lines = "".join(json.dumps(one) + "\n" for one in asked)
        output = subprocess.run(
            [sys.executable, "-P", script], input=lines, capture_output=True, text=True, timeout=60
        )
        assert output.stdout == "ready\ntrue\nfalse\nfalse\n"
