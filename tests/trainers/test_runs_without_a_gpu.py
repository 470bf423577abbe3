"""A recipe for a GPU on a machine without one: `hf-rb check`, every verb and `accelerate launch` do the same."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
import yaml

from hf_rb.cli import main
from hf_rb.cli.check import check, read_recipe
from hf_rb.scripts import _common


BASE = {"model_name_or_path": "tiny:student", "dataset_name": "tiny:math", "report_to": "none"}
RECIPES = {
    "sft": {},
    "gkd": {"teacher_model_name_or_path": "tiny:teacher"},
    "distillation": {"teacher_model_name_or_path": "tiny:teacher", "dataset_config": "prompt_only"},
    "grpo": {"reward_funcs": ["exact_answer_reward"], "dataset_config": "prompt_only"},
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("hf_rb.cli.check.plan._device", lambda: "cpu")


@pytest.fixture
def recipe(tmp_path):
    def write(verb, **values):
        path = tmp_path / f"{verb}.yaml"
        path.write_text(yaml.safe_dump(BASE | RECIPES[verb] | {"output_dir": str(tmp_path / "out")} | values))
        return path

    return write


def parsed(verb, *argv):
    script = import_module(f"hf_rb.scripts.{verb}")
    return _common.parse(script.make_parser(), argv)[1]


@pytest.mark.parametrize("verb", RECIPES)
@pytest.mark.parametrize(
    ("values", "added", "bf16"),
    [
        ({"bf16": True}, "--use_cpu true", True),
        ({}, "--use_cpu true --bf16 false", False),
        ({"fp16": True}, "--use_cpu true --fp16 false --bf16 false", False),
        ({"use_cpu": True, "bf16": False}, "", False),
    ],
)
def test_script_and_check_agree(verb, values, added, bf16, recipe, capsys):
    path = recipe(verb, **values)
    report = check(path, read_recipe(path), verb)
    assert not report.errors and " ".join(report.plan.cpu_arguments) == added
    args = parsed(verb, "--config", str(path))
    assert (args.use_cpu, args.bf16, args.fp16) == (True, bf16, False)
    said = capsys.readouterr().err
    assert said == (f"No GPU was found: the run is on the CPU, with `{added}`.\n" if added else "")


def test_the_command_line_counts_too(recipe, capsys):
    args = parsed("sft", "--config", str(recipe("sft", fp16=True)), "--fp16=false", "--bf16", "true")
    assert args.use_cpu and args.bf16 and not args.fp16
    parsed("sft", "--config", str(recipe("sft", bf16=True)), "--use_cpu")  # said by the user, or by `hf-rb sft`
    assert capsys.readouterr().err.count("No GPU was found") == 1


def test_with_a_gpu_nothing_is_added(recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not parsed("sft", "--config", str(recipe("sft", bf16=False))).use_cpu
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_command_in_a_recipes_head_and_the_cache_verb_run(recipe, tmp_path, capsys):
    path = recipe("gkd", bf16=True, max_steps=1, objective="forward_kl", lmbda=0.0, max_length=64, save_strategy="no")
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "hf_rb.scripts.gkd", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("No GPU was found: the run is on the CPU, with `--use_cpu true`.") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    data = ["--max_steps", "1", "--dataset_train_split", "test"]
    assert main(["cache-teacher", str(path), str(tmp_path / "cache"), *data]) == 0
