import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.scripts import demo


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A random model in place of the embedded ones, and training that learns nothing, at once."""
    student = tmp_path / "assets" / "student"
    tokenizer = AutoTokenizer.from_pretrained(tiny.ASSETS / "tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(student)
    tokenizer.save_pretrained(student)
    shutil.copytree(student, student.with_name("teacher"))
    monkeypatch.setattr(tiny, "ASSETS", student.parent)
    monkeypatch.setattr(demo, "_train", lambda folder, arguments, log: shutil.copytree(student, folder))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_stages_table_and_files(untrained, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["demo", "--output", str(output), "--problems", "4", "--max-steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("[")] == [
        "[1/7] Load the libraries and evaluate the student on 4 held-out problems",
        "[2/7] Fine-tune it with ProFit, recipe profit/tiny-cpu",
        "[3/7] Evaluate the fine-tuned student",
        "[4/7] Quantize it with PTQTP, save, reload and compare",
        "[5/7] Evaluate the quantized student",
        "[6/7] Evaluate, quantize and evaluate the teacher, for comparison",
        "[7/7] Write the model cards",
    ]
    assert "bit-equal" in printed
    assert printed.count("exact match  perplexity  file bytes  bits/weight  tokens/s") == 1

    report = json.loads((output / "demo.json").read_text())
    before, tuned, quantized, teacher, smaller_teacher = report["rows"]
    assert before["exact_match"]["count"] == 4
    assert tuned["size"] == before["size"]
    assert 3.5 < quantized["size"]["quantized_bits_per_weight"] < 4.5
    assert quantized["size"]["file_bytes"] == (output / "student-profit-ptqtp" / "model.safetensors").stat().st_size
    assert smaller_teacher["size"]["file_bytes"] < teacher["size"]["file_bytes"]
    assert list(report["seconds"])[0].startswith("Load the libraries")

    card = ModelCard.load(output / "student-profit-ptqtp" / "README.md")
    assert card.data.tags == ["hf_rb", "profit", "ptqtp"]
    assert "`max_steps` | `3`" in card.text and "`profit_threshold` | `0.1`" in card.text
    assert str(tmp_path) not in card.content
    assert ModelCard.load(output / "teacher-ptqtp" / "README.md").data.tags == ["hf_rb", "ptqtp"]


def test_an_existing_folder_is_refused_before_anything_is_done(tmp_path, capsys, monkeypatch):
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr(demo, "_measure", None)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine"


def fake_python(path, script):
    """An executable that takes the place of Python in `accelerate launch`."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_training_shows_its_losses_and_logs_everything(tmp_path, capsys, monkeypatch):
    logs = "{'loss': '0.5', 'profit/kept_fraction': '0.9', 'epoch': '1'}"
    script = f'echo Loading; echo "{logs}"; echo "$@" >&2'
    monkeypatch.setattr("sys.executable", fake_python(tmp_path / "python", script))
    demo._train(tmp_path / "model", ["--max_steps", "3"], tmp_path / "train.log")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("      accelerate launch -m hf_rb.scripts.sft --config ")
    assert shown[1:] == ["      epoch 1.00  loss 0.5000  tokens kept 90.0%"]
    log = (tmp_path / "train.log").read_text()
    assert "Loading" in log and "launch" in log and "-m hf_rb.scripts.sft --config" in log and "--max_steps 3" in log


def test_a_failed_training_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", fake_python(tmp_path / "python", "echo 'no such key' >&2; exit 3"))
    with pytest.raises(RuntimeError, match="exit code 3:\nno such key"):
        demo._train(tmp_path / "model", [], tmp_path / "train.log")


def test_training_logs_are_shortened():
    line = "{'loss': '0.5454', 'grad_norm': '2.3', 'profit/kept_fraction': '0.859', 'epoch': '0.03'}\n"
    assert demo._summarize(line) == "epoch 0.03  loss 0.5454  tokens kept 85.9%"
    for other in ("Loading weights: 100%", "{'eval_loss': 1.0}", "[1, 2]", "", "{'loss'"):
        assert demo._summarize(other) is None


@pytest.mark.slow
def test_the_real_thing(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["demo", "--output", str(output), "--problems", "100"]) == 0
    before, tuned, quantized, *_ = json.loads((output / "demo.json").read_text())["rows"]
    assert tuned["exact_match"]["accuracy"] > before["exact_match"]["accuracy"]
    assert quantized["size"]["file_bytes"] < before["size"]["file_bytes"] / 2
    assert "tokens kept" in capsys.readouterr().out
