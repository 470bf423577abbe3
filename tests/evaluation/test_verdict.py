"""The verdict on a ratio of perplexities, and where verbs and reports say it."""

import json
import math
from dataclasses import asdict

import pytest

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.evaluation import judge
from hf_rb.quantizers import LayerReport, Report
from hf_rb.recover.report import RecoverReport, Row


THRESHOLDS = "(our thresholds: below 1.1 close, below 2 damaged, else broken)"


@pytest.mark.parametrize(
    ("times", "word"),
    [(0.9, "close"), (1.0999, "close"), (1.1, "damaged"), (1.999, "damaged"), (2.0, "broken"), (math.inf, "broken")],
)
def test_thresholds(times, word):
    assert judge(times, 1.0, "16 bits").word == word
    assert str(judge(math.nan, 1.0, "16 bits")).startswith(
        "Perplexity is inf times that of 16 bits: this model is broken"
    )


def test_the_sentence():
    found = judge(1368.0, 66.56, "16 bits", rounded=69.9)
    assert str(found) == (
        f"Perplexity is 20.6 times that of 16 bits: this model is broken {THRESHOLDS}. Plain 4-bit rounding: 1.05 times."
    )
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["word"] == "broken" and stored["sentence"] == str(found)
    assert (stored["close_below"], stored["damaged_below"]) == (1.1, 2.0)
    assert str(judge(1e6, 10.0, "16 bits")).startswith("Perplexity is 100,000 times that")
    assert "rounding" not in str(judge(3.0, 2.0, "tiny:teacher"))
    for original in (math.inf, math.nan):
        assert str(judge(3.0, original, "16 bits", 2.0)) == (
            "Nothing can be said of this model: the perplexity of 16 bits is itself infinite or not a number."
        )


@pytest.mark.parametrize(
    ("measured", "original", "rounded", "word", "stored"),
    [
        (3.0, math.nan, 2.0, "unknown", (None, None)),
        (3.0, math.inf, 2.0, "unknown", (None, None)),
        (math.inf, 3.0, 3.0, "broken", (None, 1.0)),
        (3.0, 3.0, math.nan, "close", (1.0, None)),
    ],
)
def test_a_ratio_that_is_not_finite_is_null_in_json(measured, original, rounded, word, stored):
    found = judge(measured, original, "16 bits", rounded)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (document["times"], document["rounded_times"]) == stored
    assert found.word == document["word"] == word and "nan" not in document["sentence"]


def test_a_report_of_quantization():
    report = Report("ptqtp", [LayerReport("model.layers.0.mlp.up_proj", 4, 0.2)])
    assert report.quality() is None and report.to_dict()["quality"] is None
    report.eval_data, report.perplexity_before, report.perplexity_after = "text.txt", 10.0, 15.0
    report.bits_before, report.perplexity_rounded = 16, 10.5
    sentence = f"Perplexity is 1.50 times that of 16 bits: this model is damaged {THRESHOLDS}. Plain 4-bit rounding: 1.05 times."
    assert str(report.quality()) == sentence and sentence in report.markdown()
    stored = report.to_dict()
    assert stored["quality"]["sentence"] == sentence and asdict(report).items() <= stored.items()


def test_a_report_of_a_recovery():
    rows = [Row("full precision", 9, None, 10.0, 5.0), Row("PTQTP, 2 planes", 3, None, 40.0, 5.0)]
    report = RecoverReport(None, "text.txt", 0, rows=rows[:1])
    assert report.quality() is None and report.sentences() == []
    report.rows, report.rounded_perplexity, report.notes = list(rows), 10.4, ["A note."]
    assert report.quality().word == "broken"
    report.rows.append(Row("PTQTP, 2 planes + LoRA", 4, None, 12.0, 5.0, objective="akl"))
    sentence = f"Perplexity is 1.20 times that of full precision: this model is damaged {THRESHOLDS}. Plain 4-bit rounding: 1.04 times."
    assert report.sentences() == [sentence, "A note."] and sentence in report.markdown()
    assert report.to_dict()["quality"]["sentence"] == sentence
    report.rows[0].exact_match, report.rows[-1].exact_match = 1.0, 2 / 3
    fell = "Exact match fell from 100.0% to 66.7%, which perplexity need not show: judge by both."
    assert report.sentences() == [sentence, fell, "A note."]
    report.rows[-1].exact_match = 1.0
    assert report.sentences() == [sentence, "A note."]


@pytest.fixture
def text(tmp_path):
    problems = tiny.load_dataset("math", "messages", "test", 30)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(message["content"] for row in problems for message in row["messages"]))
    return file


def test_eval_beside_a_baseline(text, tmp_path, capsys):
    out = tmp_path / "eval.json"
    arguments = ["--perplexity", str(text), "--window", "128", "--baseline", "tiny:teacher", "--out", str(out)]
    assert main(["eval", "tiny:student", *arguments]) == 0
    printed = capsys.readouterr()
    written = json.loads(out.read_text())
    times = written["perplexity"]["perplexity"] / written["baseline"]["perplexity"]
    assert written["baseline"]["model"] == "tiny:teacher" and written["quality"]["times"] == times
    assert f"times that of tiny:teacher: this model is {written['quality']['word']} {THRESHOLDS}." in printed.out
    assert "The baseline was loaded and measured in" in printed.err


def test_a_baseline_that_does_not_compare(text, tmp_path, capsys):
    assert main(["eval", "tiny:student", "--baseline", "tiny:teacher"]) == 2
    assert "add --perplexity FILE, or leave it out" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.path("teacher").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert main(["eval", "tiny:student", "--perplexity", str(text), "--baseline", str(other)]) == 2
    error = capsys.readouterr().err
    assert "has room for windows of 512 tokens" in error and "write `--window 128`" in error
    stored = json.loads((other / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(stored))
    assert main(["eval", "tiny:student", "--perplexity", str(text), "--baseline", str(other)]) == 2
    assert "makes other tokens of" in (error := capsys.readouterr().err) and "bits per byte" in error
