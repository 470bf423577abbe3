"""`hf-rb cache-teacher`, and training from what it writes."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.cli.cache_teacher import _next_step
from hf_rb.cli.check import check, read_overrides, read_recipe
from hf_rb.scripts import gkd
from hf_rb.teachers import LocalTeacher


@pytest.fixture
def recipe(tmp_path, models):
    """Returns a function that writes a recipe that trains from a cache."""
    tiny.load_dataset("math", config="messages", size=8).to_json(tmp_path / "data.jsonl")

    def write(**values):
        values = {
            "model_name_or_path": models["student"],
            "datasets": [{"path": "json", "data_files": str(tmp_path / "data.jsonl")}],
            "objective": "forward_kl",
            "lmbda": 0.0,
            "max_length": 96,
            "max_steps": 2,
            "logging_steps": 1,
            "teacher_cache": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        } | values
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def train(recipe, *overrides):
    trainer = gkd.build(*gkd.prepare(["--config", recipe, *overrides]))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_from_a_cache_as_from_the_teacher(recipe, models, capsys, monkeypatch):
    with_teacher = recipe(teacher_cache=None, teacher_model_name_or_path=models["teacher"])
    expected = train(with_teacher)
    path = recipe()
    capsys.readouterr()
    arguments = ["--teacher_model_name_or_path", models["teacher"], "--k", "1024", "--dtype", "float32", "--json"]
    assert main(["cache-teacher", path, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["truncation_kl"] == pytest.approx(0, abs=1e-5) and report["sequences"] == 8

    def forbidden(*args):
        raise AssertionError("The teacher ran.")

    monkeypatch.setattr(LocalTeacher, "score", forbidden)
    monkeypatch.setattr(LocalTeacher, "prepare", forbidden)
    assert train(path) == pytest.approx(expected, rel=1e-4)
    train(path, "--packing", "true")


def test_says_what_it_wrote_and_goes_on(recipe, models, capsys):
    path = recipe(teacher_model_name_or_path=models["teacher"], teacher_cache=None)
    assert main(["cache-teacher", path, path + ".cache", "--k", "8"]) == 0
    output = capsys.readouterr().out
    assert "8 sequences" in output and "for each prediction" in output and "truncation KL" in output
    assert main(["cache-teacher", path, path + ".cache", "--k", "8"]) == 0
    assert "1, of which 1 were there" in capsys.readouterr().out
    assert main(["cache-teacher", path, path + ".cache", "--k", "16"]) == 2
    assert "holds a teacher cache with `k: 8` where this one has `k: 16`" in capsys.readouterr().err


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("is_set", [True, False])
def test_its_last_words_say_how_to_train(recipe, models, tmp_path, capsys, is_named, is_set):
    """Whether or not the recipe names the teacher, and the folder of the cache."""
    teacher, folder = models["teacher"], str(tmp_path / "cache")
    path = recipe(teacher_model_name_or_path=teacher if is_named else None, teacher_cache=folder if is_set else None)
    arguments = [] if is_set else [folder]
    arguments += [] if is_named else ["--teacher_model_name_or_path", teacher]
    assert main(["cache-teacher", path, *arguments, "--k", "4", "--max_length", "80"]) == 0
    *_, step, command = capsys.readouterr().out.splitlines()
    if is_named:
        assert step.startswith(f"In {path}, remove the line `teacher_model_name_or_path: ...`.")
        Path(path).write_text(
            re.sub("^teacher_model_name_or_path: .*$", "", Path(path).read_text(), flags=re.MULTILINE)
        )
    program, verb, path, *overrides = shlex.split(command)
    assert (program, verb) == ("hf-rb", "gkd")
    assert check(Path(path), read_recipe(Path(path)) | read_overrides(overrides, verb), verb).errors == []
    assert len(train(path, *overrides)) == 2


def test_a_shipped_recipe_is_copied_first():
    args = argparse.Namespace(recipe="akl/tiny-cpu", overrides=["--max_length", "80"])
    step, command = _next_step(args, Path("/somewhere/akl/tiny-cpu.yaml"), {}, "folder", has_teacher=True).splitlines()
    assert step.startswith(
        "In a copy of /somewhere/akl/tiny-cpu.yaml, remove the line `teacher_model_name_or_path: ...`."
    )
    assert command == "hf-rb gkd COPY --max_length 80 --teacher_cache folder"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "There is no teacher. Pass `--teacher_model_name_or_path`"),
        ({"teacher_cache": None, "teacher_model_name_or_path": "x"}, "There is no folder for the cache."),
        ({"teacher_model_name_or_path": "x", "lmbda": 0.5}, "`teacher_cache` needs `lmbda: 0.0`"),
        ({"teacher_model_name_or_path": "x", "objective": "hpd"}, "`objective: hpd` needs all of them"),
        ({"teacher_model_name_or_path": "x", "betta": 1}, "unknown key `betta`; did you mean `beta`?"),
    ],
)
def test_refuses(recipe, capsys, values, message):
    assert main(["cache-teacher", recipe(**values)]) == 2
    assert re.search(message, capsys.readouterr().err)
