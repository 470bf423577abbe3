import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_rb import tiny
from hf_rb.cli import main


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
    for words in ("exact match, 4 problems", "perplexity, window 64, stride 32", "tokens/s", "true bits per weight"):
        assert words in printed
    written = json.loads(out.read_text())
    assert len(written["exact_match"]["completions"]) == 4
    assert written["perplexity"]["stride"] == 32
    assert written["size"]["file_bytes"] == (folder / "model.safetensors").stat().st_size


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
        (["{model}", "--perplexity", "{tmp}/columns.jsonl"], "write window=256"),
        (["{model}", "--out", "{tmp}/none/out.json"], "there is no folder"),
        (["{model}", "--batch-size", "0"], "--batch-size 0: write 1 or more"),
        (["{adapter}"], "holds an adapter"),
    ],
)
def test_bad_input_is_one_readable_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "columns.jsonl").write_text('{"prompt": "2 + 2?"}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    names = {"tmp": tmp_path, "model": folder, "adapter": tmp_path / "adapter"}
    assert main(["eval", *(argument.format(**names) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-rb eval: error: ") and message in error


def test_help(capsys):
    assert main(["eval", "--help"]) == 0
    assert "hf-rb eval tiny:student" in capsys.readouterr().out
