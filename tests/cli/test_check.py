import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from hf_rb.cli import check as check_module
from hf_rb.cli import main, schemas
from hf_rb.cli.check import check, read_overrides, read_recipe
from hf_rb.cli.schemas.libraries import class_fields
from hf_rb.io.resources import find_recipe, resource_folder


GOOD = {
    "model_name_or_path": "tiny:student",
    "dataset_name": "tiny:math",
    "dataset_config": "prompt_completion",
    "output_dir": "out",
    "learning_rate": 1e-3,
    "profit_threshold": 0.1,
    "use_cpu": True,
    "bf16": False,
}


def errors(**changes) -> list[str]:
    return check(Path("recipe.yaml"), GOOD | changes).errors


SOURCE = """
from __future__ import annotations
import typing
import somelib
from dataclasses import dataclass, field
from enum import Enum
try:
    from .other import LEVELS as levels
except ImportError:
    pass

class Kind(str, Enum):
    A = "a"
    B = "b"

class Mixin:
    not_a_field: int = 1

@dataclass
class Base:
    inherited: int = 1

@dataclass
class Item:
    x: int = 3

@dataclass
class Config(Mixin, somelib.Base):
    must: list[Item] | typing.Any
    optional: typing.Optional[float] = None
    union: typing.Union[str, int, None] = field(default=None)
    text: "bool" = True
    computed: dict = field(default=Item().x)
    made: typing.List[int] = field(default_factory=lambda: [1, 2])
    kind: Kind = Kind.A
    level: str = field(default="low", metadata={"choices": levels, "help": "x"})
    ours: float = field(default=0.5, metadata=described("Share.", range="[0, 1]"))
    hidden: int = field(init=False, default=0)
    shared: typing.ClassVar[int] = 0
"""


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes))
        return str(path)

    return write


def test_a_good_recipe(recipe, capsys):
    path = recipe(env={"HF_HUB_OFFLINE": "1"})
    assert main(["check", path]) == 0
    first, device, plan, memory = capsys.readouterr().out.splitlines()
    assert first == f"{path}: a good recipe for `hf-rb sft`."
    assert device == f"{path}: device: cpu, float32"
    assert plan.endswith("3,750 steps of 8 sequences of at most 1,024 tokens: at most 30,720,000 tokens (one process)")
    assert "the largest part is runtime" in memory and "logits 0.1 GB" in memory


def test_everything_wrong_is_said_in_one_pass(recipe, capsys):
    path = recipe(profit_treshold=0.1, max_length="long", profit_threshold=1.5, optim="adamw_troch", fp16=True)
    assert main(["check", path]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: error: `max_length` must be int or null; got 'long' (str).",
        f"{path}: error: `optim` cannot be 'adamw_troch'; did you mean 'adamw_torch'?",
        f"{path}: error: `profit_threshold` must be in [0, 1]; got 1.5.",
        f"{path}: error: unknown key `profit_treshold`; did you mean `profit_threshold`?",
        f"{path}: error: `fp16: true` needs a GPU, and `use_cpu` is true. Write `bf16: true` or `bf16: false` instead.",
    ]


def test_a_recipe_for_another_verb(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: tiny:student\nquantization_config: {group_sise: 64}\n")
    assert main(["check", str(path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: error: unknown key `quantization_config.group_sise`; did you mean `quantization_config.group_size`?",
        f"{path}: error: `output_dir` is missing.",
    ]
    assert main(["check", str(path), "--for", "sft"]) == 2
    assert (
        "`quantization_config` is a key of `hf-rb quantize` and `hf-rb recover`, and this recipe is for `hf-rb sft`"
        in capsys.readouterr().err
    )


def test_a_recipe_of_which_most_keys_are_another_verbs():
    path = find_recipe("profit/tiny-cpu")
    assert check(path, read_recipe(path), "recover").errors == [
        "this is a recipe for `hf-rb sft`, not for `hf-rb recover`."
    ]


@pytest.mark.parametrize("key, value", [("kd_alpha", 0.5), ("loca_alpha", 0.95), ("teacher_cache", "x")])
def test_what_only_gkd_can_do(key, value):
    path = find_recipe("profit/tiny-cpu")
    assert check(path, read_recipe(path) | {key: value}, "sft").errors == [
        f"`{key}` acts on the completions of the dataset, which GKD alone distils on. Use `GKDTrainer` (`hf-rb gkd`) with "
        f"`lmbda: 0.0`, or remove `{key}`."
    ]


def test_a_key_of_another_trainer():
    path = find_recipe("exopd/tiny-cpu")
    (error,) = check(path, read_recipe(path) | {"loss_impl": "dense"}, "distillation").errors
    assert error.startswith("`loss_impl` is a key of `hf-rb gkd`, and this recipe is for `hf-rb distillation`.")


def test_json(recipe, capsys):
    path = recipe(learning_ratee=1)
    assert main(["check", path, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == [
        {
            "recipe": path,
            "verb": "sft",
            "errors": ["unknown key `learning_ratee`; did you mean `learning_rate`?"],
            "warnings": [],
            "notes": [],
            "plan": None,
        }
    ]
    assert main(["check", recipe(max_steps=10), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)[0]["plan"]
    assert (plan["device"], plan["precision"], plan["steps"], plan["sequences"]) == ("cpu", "float32", 10, 8)
    assert plan["largest"] == max(plan["memory"], key=plan["memory"].get)
    assert plan["memory"]["weights"] < plan["peak"] < sum(plan["memory"].values())


def test_several_recipes(recipe, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("learning_ratee: 1\n")
    assert main(["check", recipe(), str(bad)]) == 2
    output = capsys.readouterr()
    assert "a good recipe" in output.out and "did you mean `learning_rate`?" in output.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_epochs": None}, "`num_train_epochs` must be float; got None"),
        ({"max_steps": 1.5}, "`max_steps` must be int; got 1.5"),
        ({"max_steps": True}, "`max_steps` must be int; got True (bool)"),
        ({"packing": "perhaps"}, "`packing` must be bool; got 'perhaps'"),
        ({"eval_strategy": False}, "`eval_strategy` must be str; got False (bool). YAML reads no, off, yes and on"),
        ({"lora_target_modules": 5}, "`lora_target_modules` must be list[str] or null; got 5 (int)"),
        ({"profit_mode": "midle"}, "`profit_mode` cannot be 'midle'; did you mean 'middle'?"),
        ({"dataset_name": None}, "no dataset"),
        ({"datasets": [{"path": "json", "data_fils": "x"}]}, "did you mean `datasets[0].data_files`?"),
        ({"model_name_or_path": None}, "no model"),
        ({"model_init_kwargs": "{x"}, "`model_init_kwargs: {x` is no JSON (Expecting property name"),
        ({"datasets": ["x"]}, "`datasets` must be list[dict]; got ['x']"),
        ({"datasets": [{"path": "json", "data_dir": 3}]}, "`datasets[0].data_dir` must be null or str; got 3"),
        ({"datasets": [{"name": "x"}]}, "`datasets[0].path` is missing"),
        ({"datasets": [{"path": "json", "data_files": "absent.jsonl"}]}, "'absent.jsonl', which does not exist"),
        (
            {"datasets": [{"path": "json", "data_files": {"train": ["absent.jsonl"]}}]},
            "'absent.jsonl', which does not",
        ),
        (
            {"model_init_kwargs": {"quantization_config": {"quant_method": "ptqtp", "group_sise": 64}}},
            "did you mean `model_init_kwargs.quantization_config.group_size`?",
        ),
        (
            {"model_init_kwargs": {"quantization_config": {"quant_method": "ptqtp", "planes": 4}}},
            "`model_init_kwargs.quantization_config.planes` cannot be 4; it must be one of 1, 2, 3.",
        ),
        (
            {
                "model_init_kwargs": {"quantization_config": {"quant_method": "ptqtp", "tol": "1e-4"}}
            },  # as YAML 1.1 reads it
            "quantization_config.tol` must be float; got '1e-4' (str). Write a number without quotes; YAML reads one such as",
        ),
        ({"dataset_name": "./absent"}, "`dataset_name` names './absent', which does not exist"),
        ({"model_name_or_path": "/absent/model"}, "`model_name_or_path` names '/absent/model', which does not exist"),
        ({"model_name_or_path": "tiny:studnet"}, "write one of tiny:teacher"),
        ({"fp16": True, "use_cpu": False, "bf16": True}, "`fp16` and `bf16` are both true"),
    ],
)
def test_one_mistake_is_one_error(changes, message):
    (error,) = errors(**changes)
    assert message in error


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": "1e-4"},  # YAML 1.1 reads 1e-4 as a string
        {"num_train_epochs": 3},
        {"packing": "true"},
        {"max_length": "none"},
        {"report_to": "none"},
        {"report_to": ["wandb"]},
        {"resume_from_checkpoint": True},
        {"dataset_test_split": "not read"},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"model_init_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}},
        {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        {"model_init_kwargs": '{"attn_implementation": "eager"}'},
        {"datasets": [{"path": "json", "data_files": ["data/*.jsonl", "https://example.com/x.jsonl"]}]},
        {"datasets": [{"path": "json", "data_files": __file__}]},
    ],
)
def test_what_the_configs_accept_passes(changes):
    assert errors(**changes) == []


@pytest.mark.parametrize(
    ("method", "close"), [("ptqtpp", "ptqtp"), (["ptqtp"], None), ("quanto", None), ("gptq", None)]
)
def test_a_trained_model_may_have_another_librarys_method(method, close):
    config = {"model_init_kwargs": {"quantization_config": {"quant_method": method}}}
    report = check(Path("recipe.yaml"), GOOD | config)
    key = "model_init_kwargs.quantization_config.quant_method"
    assert not report.errors
    assert report.warnings == ([f"`{key}` is {method!r}; did you mean {close!r}?"] if close else [])


def test_a_data_file_is_not_a_dataset_name(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.touch()
    (error,) = errors(dataset_name=str(file))
    assert error == f"`dataset_name: {file}` is a file. Write `datasets: [{{path: json, data_files: {file}}}]`."


@pytest.mark.parametrize(("number", "processes"), [(8, None), (128, 2), (7, 7)])
def test_how_many_processes_hold_whole_groups(number, processes):
    path = find_recipe("edas/tiny-cpu")
    report = check(path, read_recipe(path) | {"num_generations": number, "eval_strategy": "no"})
    assert not report.errors
    assert (report.warnings == []) == (processes is None)
    assert all(f"this will run with {processes} processes or a multiple" in warning for warning in report.warnings)
    evaluated = check(path, read_recipe(path) | {"num_generations_eval": number, "eval_strategy": "steps"})
    assert all(" in evaluation: " in warning for warning in evaluated.warnings)


def test_check_another_version_of_a_library_takes_its_keys(tmp_path, monkeypatch):
    """The keys are those of the sources that are installed, wherever a version has moved a class to."""
    shutil.copytree(Path(find_spec("trl").origin).parent, tmp_path / "trl", ignore=shutil.ignore_patterns("*.pyc"))
    moved = (tmp_path / "trl/trainer/sft_config.py").rename(tmp_path / "trl/trainer/moved.py")
    new = '    new_key: int | None = field(default=None, metadata={"help": "100 %% new."})'
    moved.write_text(moved.read_text().replace("    packing: bool", f"{new}\n\n    packing: bool"))
    names = tmp_path / "trl/trainer/__init__.py"
    names.write_text(names.read_text().replace("from .sft_config import", "from .moved import"))
    command = [sys.executable, "-m", "hf_rb.cli", "check", "--for", "sft", str(tmp_path / "recipe.yaml")]

    def told(**changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GOOD | changes))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr.splitlines()

    start = f"{tmp_path / 'recipe.yaml'}: error: "
    assert told(new_key="many")[0] == f"{start}`new_key` must be int or null; got 'many' (str)."
    assert told(nwe_key=1)[0] == f"{start}unknown key `nwe_key`; did you mean `new_key`?"
    moved.write_text(moved.read_text().replace("    max_length: int", "    longest: int"))
    (error,) = told()
    assert error.startswith(
        f"{start}hf_rb reads the key `max_length`, which the installed TRL or transformers does not have"
    )
    moved.write_text("")
    (error,) = told()
    assert error.startswith("hf-rb check: error: trl 1") and "has no class `trl.SFTConfig`" in error
    assert "hf_rb works with trl" in error and error.endswith("`pip install hf_rb`.")


STAND_IN = Path(check_module.__file__).parents[2] / "trainers/gkd/base_config.py"


@pytest.mark.skipif(not STAND_IN.is_file(), reason="GKDConfig has no class of ours for TRL's")
def test_check_takes_gkd_recipes_where_trl_has_dropped_its_class(tmp_path):
    ignored = shutil.ignore_patterns("*.pyc", "gkd")
    shutil.copytree(Path(find_spec("trl").origin).parent, tmp_path / "trl", ignore=ignored)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "hf_rb.cli", "check", "akl/tiny-cpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert result.returncode == 0, result.stderr


def test_check_works_read_only_and_without_a_home(tmp_path):
    """Nothing is written, and nothing is read but the package, the libraries' sources and the recipe."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    shutil.copytree(Path(check_module.__file__).parents[2], tmp_path / "hf_rb", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(resource_folder("recipes"), tmp_path / "recipes")
    paths = [tmp_path, *tmp_path.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "hf_rb.cli", "check", str(tmp_path / "recipe.yaml")]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    env = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    for path in paths:
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b", "must hold `key: value` lines; got list"),
        ("", "got NoneType"),
        ("a: 1\nb: [{c: 1,\n c: 2}]", "gives `c` twice, again in line 3"),
    ],
)
def test_no_recipe_at_all(tmp_path, text, message, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["check", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_recipe(capsys):
    assert main(["check", "absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith("hf-rb check: error: No recipe 'absent.yaml'")


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--learning_rate", "1e-4", "--max-steps=3"], {"learning_rate": "1e-4", "max_steps": "3"}),
        (["--packing", "--no_shuffle_dataset"], {"packing": True, "shuffle_dataset": False}),
        (["--lora_target_modules", "q_proj"], {"lora_target_modules": ["q_proj"]}),
        (
            ["--lora_target_modules", "q_proj", "k_proj", "v_proj"],
            {"lora_target_modules": ["q_proj", "k_proj", "v_proj"]},
        ),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--misspelt", "1"], {"misspelt": "1"}),
    ],
)
def test_overrides(arguments, values):
    assert read_overrides(arguments, "sft") == values


def test_a_stray_argument():
    with pytest.raises(ValueError, match="unexpected argument '3'"):
        read_overrides(["3"], "sft")


@pytest.mark.parametrize(("verb", "arguments", "code"), [("check", [], 0), ("sft", ["--learning_ratee", "1"], 2)])
def test_a_mistake_costs_neither_torch_nor_a_second(recipe, verb, arguments, code):
    program = (
        "import sys; from hf_rb.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, verb, recipe(), *arguments]
    # Processor time, because other processes may share the cores.
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 0.6
    assert result.returncode == code and result.stdout.endswith("set()\n")


@pytest.mark.parametrize("name", [*schemas.RECIPES, *schemas.quantization(), *schemas.PARTS])
def test_schemas_read_from_sources_are_those_of_the_classes(name):
    from helpers.config_schemas import configs_of, keys_of

    assert schemas.load(name) == keys_of(configs_of(name))


def test_schemas_values_in_sources(tmp_path, monkeypatch):
    """What the installed libraries write nowhere, and other versions may."""
    (tmp_path / "somelib").mkdir()
    (tmp_path / "somelib/__init__.py").write_text(SOURCE)
    (tmp_path / "somelib/other.py").write_text("LEVELS = ['low', 'high']\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = class_fields("somelib:Config")
    assert list(entries) == [
        "inherited",
        "must",
        "optional",
        "union",
        "text",
        "computed",
        "made",
        "kind",
        "level",
        "ours",
    ]
    assert [entries[key]["types"] for key in entries] == [
        ["int"], ["any", "list[dict]"], ["float", "null"], ["int", "null", "str"], ["bool"], ["dict", "null"], ["list[int]"], ["str"],
        ["str"], ["float"],
    ]  # fmt: skip
    assert entries["ours"] == {"types": ["float"], "default": 0.5, "range": "[0, 1]", "help": "Share.", "own": True}
    assert "default" not in entries["must"] and entries["computed"]["default"] is None
    assert (entries["made"]["default"], entries["kind"]["default"], entries["text"]["default"]) == ([1, 2], "a", True)
    assert entries["kind"]["choices"] == ["a", "b"] and entries["level"]["choices"] == ["low", "high"]
    assert entries["must"]["keys"] == {"x": {"types": ["int"], "default": 3, "help": ""}}
    with pytest.raises(ValueError, match="no class `somelib.Nothing`"):
        class_fields("somelib:Nothing")
    with pytest.raises(ValueError, match="nowhere, which is not installed, has no class `nowhere.Config`"):
        class_fields("nowhere:Config")
