"""What is wrong with a folder or a column is said before torch is imported."""

import json
import resource
import subprocess
import sys

import pytest

from hf_rb.cli import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": "One."}) + "\n")
    (tmp_path / "text.txt").write_text("One.")
    return tmp_path


NOWHERE = "There is no folder WRONG, and the Hub has no such model or cannot be reached"
COLUMN = "rows.jsonl has the columns content; one called `text` is needed: rename the one to read."
CASES = [
    (["eval", "WRONG"], NOWHERE),
    (["export", "WRONG", "out"], NOWHERE),
    (["dequantize", "WRONG", "out"], NOWHERE),
    (["upcycle", "WRONG", "out"], NOWHERE),
    (["router-report", "WRONG", "tiny:math"], NOWHERE),
    (["merge", "--method", "timber", "--model", "WRONG", "out"], NOWHERE),
    (["merge", "--method", "linear", "--start", "tiny:student", "--end", "WRONG", "out"], NOWHERE),
    (["quantize", "WRONG", "out"], NOWHERE),
    (["push", "WRONG", "me/x"], "There is no folder WRONG."),
    (["gkd", "akl/tiny-cpu", "--teacher_model_name_or_path", "WRONG"], NOWHERE),
    (["sft", "profit/tiny-cpu", "--model_name_or_path", "WRONG"], NOWHERE),
    (["cache-teacher", "akl/tiny-cpu", "out", "--teacher_model_name_or_path", "WRONG"], NOWHERE),
    (["audit", "--config", "akl/tiny-cpu", "--teacher_model_name_or_path", "WRONG"], NOWHERE),
    (["recover", "recover/tiny-cpu", "--model_name_or_path", "WRONG"], NOWHERE),
    (["dequantize", "tiny:student", "out"], "tiny:student is not quantized."),
    (["export", "tiny:student", "out"], "tiny:student is not quantized."),
    (["eval", "tiny:student", "--task", "rows2.jsonl"], "There is no task file rows2.jsonl"),
    (["quantize", "tiny:student", "out", "--method", "d2quant", "--dataset", "rows.jsonl"], COLUMN),
    (["quantize", "tiny:student", "out", "--eval-data", "rows.jsonl"], COLUMN),
    (["router-report", "tiny:moe", "rows.jsonl"], COLUMN),
    (["cache-teacher", "akl/tiny-cpu", "out", "--dataset_config", "prompt_only"], "needs `messages`, `prompt` with `completion`"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(case[0][:3]) for case in CASES])
def test_the_message(arguments, message, files, capsys):
    before = sorted(files.iterdir())
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(files.iterdir()) == before  # nothing is left behind


def test_refusals_import_neither_torch_nor_transformers(files):
    script = (
        "import sys\nfrom hf_rb.cli import main\n"
        f"assert {{main(arguments) for arguments in {[case[0] for case in CASES]!r}}} == {{2}}\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, because other processes may share the cores: each alone is to answer within 2 s, and so do all of them.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_dense_model_has_no_routers(capsys):
    assert main(["router-report", "tiny:student", "tiny:math"]) == 2
    assert "Qwen3ForCausalLM has no mixture of experts: this model has no routers." in capsys.readouterr().err
