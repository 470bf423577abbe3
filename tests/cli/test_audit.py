import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.random_models import save_qwen3

from hf_rb import tiny
from hf_rb.cli import main
from hf_rb.io.resources import find_recipe
from hf_rb.objectives.gopd import GOPD
from hf_rb.teachers import CachedTeacher


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folders of a random student and teacher with the embedded tokenizer, and of a student with more padding."""
    folder = tmp_path_factory.mktemp("family")
    for seed, (name, hidden, padding) in enumerate(
        [("student", 32, 0), ("teacher", 48, 8), ("padded-student", 32, 24)]
    ):
        save_qwen3(
            folder / name,
            seed,
            padding,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=1,
            head_dim=16,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    return folder


@pytest.fixture(autouse=True)
def small(family, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "path", lambda name: family / name)
    monkeypatch.setitem(tiny.SIZES, "train", 64)
    monkeypatch.chdir(tmp_path)


def audit(capsys, *arguments):
    code = main(["audit", "--json", "--max_new_tokens", "6", *arguments])
    output = capsys.readouterr()
    return code, {row["path"]: row for row in json.loads(output.out)["paths"]} if code != 2 else output.err


@pytest.mark.parametrize(
    ("given", "shown"), [(["akl/tiny-cpu"], "akl/tiny-cpu"), (["--lmbda", "0"], "RECIPE"), ([], "RECIPE")]
)
def test_the_recipe_is_an_option(given, shown, capsys):
    assert main(["audit", *given]) == 2
    assert f"Write `hf-rb audit --config {shown}`." in capsys.readouterr().err


COMMON = {"as trained", "tiles of 7 tokens", "one sequence at a time"}


PATHS = {
    "exopd": (["exopd/tiny-cpu"], {"more padding", "student = teacher"}),
    "token sums, full vocabulary": (
        ["exopd/tiny-cpu", "--gopd_full_vocab", "true", "--gopd_aggregation", "seq-mean-token-sum"],
        {"more padding", "student = teacher"},
    ),
    "on-policy jsd with lora": (
        ["exopd/tiny-cpu", "--objective", "jsd", "--reward_scale", "1", "--beta", "0.4", "--use_peft", "true"],
        {"more padding", "student = teacher"},
    ),
    "a teacher that is narrower": (
        ["exopd/tiny-cpu", "--model_name_or_path", "tiny:padded-student"],
        {"more padding", "student = teacher"},
    ),
    "akl": (["akl/tiny-cpu"], {"more padding", "student = teacher"}),
    "hpd": (["hpd/tiny-cpu"], {"more padding"}),
    "loca, packed": (["loca/tiny-cpu", "--packing", "true"], {"unpacked", "student = teacher"}),
}


@pytest.mark.parametrize("arguments, paths", PATHS.values(), ids=PATHS)
def test_every_path_is_the_dense_one(capsys, arguments, paths):
    code, rows = audit(capsys, "--config", *arguments)
    assert code == 0
    assert rows.keys() == COMMON | paths


@pytest.fixture
def cached_recipe(capsys):
    """Returns a function that writes a recipe that trains from a cache of a few tokens, in half precision."""

    def write(name, **keys):
        assert main(["cache-teacher", name, "cache", "--k", "6"]) == 0
        capsys.readouterr()
        keys = yaml.safe_load(find_recipe(name).read_text()) | {"teacher_cache": "cache"} | keys
        del keys["teacher_model_name_or_path"]
        Path("recipe.yaml").write_text(yaml.safe_dump(keys))
        return "recipe.yaml"

    return write


@pytest.mark.parametrize("name", ["akl", "loca"])
def test_audit_of_a_cached_teacher_passes(capsys, cached_recipe, name):
    """Against the formulas on its events; and its teacher, by the name in the cache, against a cache of all tokens."""
    code, rows = audit(capsys, "--config", cached_recipe(f"{name}/tiny-cpu"))
    assert code == 0
    assert rows.keys() == COMMON | {"more padding", "cache of all tokens", "student = teacher"}


def test_a_cache_whose_teacher_is_elsewhere(capsys, cached_recipe, family):
    recipe = cached_recipe("akl/tiny-cpu")
    manifest = Path("cache/manifest.json")
    manifest.write_text(manifest.read_text().replace("tiny:teacher", "/elsewhere/teacher"))
    assert main(["audit", "--config", recipe]) == 0
    output = capsys.readouterr()
    assert "not with its teacher '/elsewhere/teacher', which could not be loaded" in output.err
    assert "as trained" in output.out and "all tokens" not in output.out
    code, rows = audit(capsys, "--config", recipe, "--teacher_model_name_or_path", "tiny:teacher", "--packing", "true")
    assert code == 0
    assert {"unpacked", "cache of all tokens"} <= rows.keys()
    code, error = audit(capsys, "--config", recipe, "--teacher_model_name_or_path", "/nowhere")
    assert code == 2 and "/nowhere" in error


def test_a_difference_between_cache_and_teacher_is_found(capsys, cached_recipe, monkeypatch):
    right = CachedTeacher.score

    def wrong(self, *args):
        events = right(self, *args)
        return replace(events, log_probs=events.log_probs - 0.01)

    recipe = cached_recipe("akl/tiny-cpu")
    monkeypatch.setattr(CachedTeacher, "score", wrong)
    code, rows = audit(capsys, "--config", recipe)
    assert code == 1 and not rows["cache of all tokens"]["ok"]


def test_a_difference_is_found(capsys, monkeypatch):
    """A wrong gradient with a right loss, in the tile loop alone."""
    right = GOPD.__call__

    def wrong(self, *args):
        term = right(self, *args)
        return term._replace(values=1.01 * term.values)

    monkeypatch.setattr(GOPD, "__call__", wrong)
    code, rows = audit(capsys, "--config", "exopd/tiny-cpu")
    assert code == 1
    assert not rows["as trained"]["ok"]
    assert rows["as trained"]["loss"] < 1e-5
    assert rows["as trained"]["gradient"] == pytest.approx(0.01, rel=0.01)
    assert main(["audit", "--max_new_tokens", "6", "--config", "exopd/tiny-cpu", "--tolerance", "0.1"]) == 0
    assert "as trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["profit/tiny-cpu"], "is a recipe for `hf-rb sft`"),
        (["akl/tiny-cpu", "--teacher_cache", "folder"], "There is no teacher cache in folder"),
        (["hpd/tiny-cpu", "--teacher_cache", "folder"], "`objective: hpd` needs all of them"),
        (["exopd/tiny-cpu", "--teacher_cache", "folder"], "`teacher_cache` acts on the completions of the dataset"),
        (["exopd/tiny-cpu", "--temperature", "0.7"], "`objective: gopd` needs `temperature: 1.0`"),
    ],
)
def test_bad_input(capsys, arguments, message):
    code, error = audit(capsys, "--config", *arguments)
    assert code == 2
    assert message in error


def test_what_needs_vllm_is_left_out(capsys):
    recipe = yaml.safe_load((tiny.ASSETS.parents[2] / "recipes/exopd/tiny-cpu.yaml").read_text())
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"use_vllm": True, "gopd_tis_cap": 5.0}))
    assert main(["audit", "--config", "recipe.yaml", "--max_new_tokens", "6", "--batches", "1"]) == 0
    error = capsys.readouterr().err
    assert "`gopd_tis_cap` is left out" in error
    assert re.search(r"^memory: about [\d.]+ GB a process, .*comparison \d+ ", error, re.MULTILINE)
