import json
import math
import sys

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.hub import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that answers nothing, quickly."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_table(folder, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("There are 7 red, 9 blue and 12 green cups. " * 20)
    arguments = ["--task", "tiny:math", "--limit", "4", "--max-new-tokens", "4", "--perplexity", str(text)]
    assert (
        main(["eval", str(folder), *arguments, "--window", "64", "--stride", "32", "--speed", "--out", str(out)]) == 0
    )
    printed = capsys.readouterr().out
    for words in (
        "bytes per token",
        "exact match, 4 problems",
        "perplexity, window 64, stride 32",
        "tokens/s",
        "true bits per weight",
    ):
        assert words in printed
    written = json.loads(out.read_text())
    assert len(written["exact_match"]["completions"]) == 4
    assert written["perplexity"]["stride"] == 32
    first, second = read_results(out)  # as a model card takes them
    assert (first.metric, first.dataset) == ("exact match (4 problems)", "tiny:math")
    assert second.dataset == "text.txt" and second.value == written["perplexity"]["perplexity"]
    assert second.metric.startswith("perplexity (window 64, stride 32, ")
    assert written["size"]["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_infinite_perplexity_is_null(folder, tmp_path, capsys):
    """JSON has no infinity: strict readers refuse a file that says `Infinity`."""
    broken, text, out = tmp_path / "broken", tmp_path / "text.txt", tmp_path / "out.json"
    model = Qwen3ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1e4
        model.model.norm.weight *= 1e4
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(folder).save_pretrained(broken)
    text.write_text("There are 7 red, 9 blue and 12 green cups. " * 20)
    arguments = ["eval", str(broken), "--perplexity", str(text), "--window", "64", "--out", str(out), "--json"]
    assert main(arguments) == 0
    for written in (capsys.readouterr().out, out.read_text()):
        document = json.loads(written, parse_constant=pytest.fail)
        assert document["perplexity"]["perplexity"] is None
    (result,) = read_results(out)
    assert math.isnan(result.value)


def test_json(folder, capsys):
    assert main(["eval", str(folder), "--task", "tiny:math", "--limit", "2", "--max-new-tokens", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["exact_match"]["count"] == 2
    assert "completions" not in printed["exact_match"]


def test_size_alone_needs_no_weights_in_memory(folder, capsys, monkeypatch):
    monkeypatch.setattr("hf_rb.evaluation.load_model", None)
    assert main(["eval", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "true bits per weight" in captured.out and "add --task" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "There is no folder"),
        (["no/such-model"], "There is no folder no/such-model"),
        (["tiny:pupil"], "tiny:student"),
        (["{tmp}"], "has no config.json"),
        (["{model}", "--task", "{tmp}/none.jsonl"], "There is no task file"),
        (["{model}", "--task", "tiny:maths"], "write tiny:math"),
        (["{model}", "--task", "{tmp}/columns.jsonl"], "has prompt: expected the columns question and answer"),
        (["{model}", "--perplexity", "{tmp}/none.txt"], "There is no text file"),
        (
            ["{model}", "--perplexity", "{tmp}/columns.jsonl", "--window", "8", "--stride", "9"],
            "1 <= stride <= window",
        ),
        (["{model}", "--perplexity", "{tmp}/columns.jsonl", "--window", "300"], "write window=256 (`--window 256`)"),
        (["{model}", "--out", "{tmp}/none/out.json"], "there is no folder"),
        (["{model}", "--batch-size", "0"], "--batch-size 0: write 1 or more"),
        (["{model}", "--limit", "0"], "--limit 0: write 1 or more"),
        (["{model}", "--fewshot", "2"], "--fewshot is for --harness"),
        (["{model}", "--harness", "arc_easy", "--fewshot", "-1"], "--fewshot -1: write 0 or more"),
        (["{model}", "--harness", "{tmp}/none.yaml"], "There is no task file"),
        (["{model}", "--harness", "{tmp}/notask.yaml"], "the key `task` with its name is missing"),
        (["{adapter}"], "holds an adapter"),
    ],
)
def test_bad_input_is_one_readable_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "columns.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    (tmp_path / "notask.yaml").write_text("dataset_path: json\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = {"tmp": tmp_path, "model": folder, "adapter": tmp_path / "adapter"}
    assert main(["eval", *(argument.format(**names) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-rb eval: error: ") and message in error


def test_what_is_there_is_replaced_only_when_asked_to(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("an hour's work")
    with monkeypatch.context() as patch:
        patch.setattr("hf_rb.evaluation.model_size", None)  # refused before anything is measured
        assert main(["eval", str(folder), "--out", str(out)]) == 2
    assert "is there already. Choose another --out, or pass --overwrite." in capsys.readouterr().err
    assert out.read_text() == "an hour's work"
    assert main(["eval", str(folder), "--out", str(out), "--overwrite"]) == 0
    with pytest.raises(ValueError, match="only the size was measured"):  # no row for a card
        read_results(out)


def test_help(capsys):
    assert main(["eval", "--help"]) == 0
    assert "hf-rb eval tiny:student" in capsys.readouterr().out


@pytest.fixture
def task(tmp_path):
    """A task file of one's own: two questions, each with two answers."""
    rows = [{"q": "2 + 2 =", "a": ["4", "5"], "gold": 0}, {"q": "3 + 3 =", "a": ["7", "6"], "gold": 1}]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "task" / "sums.yaml"
    file.write_text(
        "task: sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/task/rows.jsonl\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1.0\n"
    )
    return file


def test_a_task_file_through_the_harness(folder, task, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out = tmp_path / "out.json"
    assert main(["eval", str(folder), "--harness", str(task), "--out", str(out)]) == 0
    assert "sums, acc, 0-shot, 2 questions" in capsys.readouterr().out
    written = json.loads(out.read_text())
    (score,) = written["harness"]
    assert (score["task"], score["metric"], score["count"], score["version"]) == ("sums", "acc", 2, "1.0")
    assert score["value"] in (0.0, 0.5, 1.0)
    assert written["results"] == [
        {"metric": "acc (0-shot)", "value": score["value"], "dataset": "sums", "split": "test", "before": None}
    ]
    assert main(["eval", str(folder), "--harness", "sums"]) == 2  # without its file
    assert "has no task 'sums'" in capsys.readouterr().err


def test_a_task_file_that_names_code_is_not_imported(folder, task, capsys):
    (task.parent / "other.yaml").write_text("task: other\nprocess_docs: !function evil.run\n")
    (task.parent / "evil.py").write_text("raise SystemExit('imported')\n")
    assert main(["eval", str(folder), "--harness", str(task)]) == 2
    error = capsys.readouterr().err
    assert "other.yaml names Python code" in error and "--allow-local-code" in error


def test_without_the_harness_the_extra_is_named(folder, task, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folder), "--harness", str(task)]) == 2
    assert "pip install 'hf_rb[eval]'" in capsys.readouterr().err
