"""Recipes of other versions of TRL and transformers: what `hf-rb check` says of their keys, rewrites of them, and takes as TRL does."""

import pytest
import trl
import yaml

from hf_rb import cli
from hf_rb.cli import schemas
from hf_rb.cli.check import check, read_recipe
from hf_rb.io.resources import find_recipe
from hf_rb.scripts import distillation, gkd, grpo, sft
from hf_rb.utils import renamed


SCRIPTS = {"sft": sft, "gkd": gkd, "distillation": distillation, "grpo": grpo}
START = {
    "model_name_or_path": "tiny:student",
    "dataset_name": "tiny:math",
    "dataset_config": "messages",
    "use_cpu": True,
    "bf16": False,
}

OLD = """\
# Of TRL 0.16
model_name_or_path: tiny:student
torch_dtype: bfloat16  # as in the paper
overwrite_output_dir: true
dataset_name: tiny:math
max_seq_length: 256
group_by_length: true
chat_template: |
  {{ messages }}

# Training
warmup_ratio: 0.1
packing_strategy: bfd-requeue
include_inputs_for_metrics: true
output_dir: out
wandb_project:
  x
"""
NEW = """\
# Of TRL 0.16
model_name_or_path: tiny:student
dtype: bfloat16  # as in the paper
# There is no key `overwrite_output_dir` any more. transformers 5 has dropped it. Choose another `output_dir`; `overwrite: true` deletes what an earlier run has left there.
# overwrite_output_dir: true
dataset_name: tiny:math
max_length: 256
train_sampling_strategy: group_by_length
# There is no key `chat_template` any more. A recipe names a file or a model that has a template: `chat_template_path`.
# chat_template: |
#   {{ messages }}

# Training
warmup_steps: 0.1
packing_strategy: bfd_split
include_for_metrics: ["inputs"]
output_dir: out
# There is no key `wandb_project` any more. Set the environment variable `WANDB_PROJECT`, and remove it.
# wandb_project:
#   x
"""


def test_fix(tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text(OLD)
    assert cli.main(["check", "--for", "sft", str(file)]) == 2
    told = capsys.readouterr().err
    for key in ("overwrite_output_dir", "chat_template", "group_by_length", "wandb_project"):
        assert f"There is no key `{key}` any more." in told
    assert "`warmup_ratio` is now called `warmup_steps`." in told and "did you mean" not in told
    assert cli.main(["check", "--for", "sft", "--fix", str(file)]) == 0
    told = capsys.readouterr()
    assert file.read_text() == NEW and "a good recipe" in told.out
    assert "`packing_strategy: bfd-requeue` is now `packing_strategy: bfd_split`." in told.err
    assert cli.main(["check", "--for", "sft", "--fix", str(file)]) == 0
    assert file.read_text() == NEW and capsys.readouterr().err == ""


def test_fix_keeps_what_it_does_not_know(tmp_path, capsys):
    """Both names of one key, a key that nobody has, and a recipe in braces."""
    file = tmp_path / "both.yaml"
    file.write_text("torch_dtype: float16\ndtype: bfloat16\nzzz: 1\n")
    assert cli.main(["check", "--for", "sft", "--fix", str(file)]) == 2
    text = file.read_text()
    assert text.startswith("# `torch_dtype` is now called `dtype`.\n# torch_dtype: float16\ndtype: bfloat16\nzzz: 1")
    file.write_text("{torch_dtype: float16, output_dir: out}")
    assert cli.main(["check", "--for", "sft", "--fix", str(file)]) == 2
    assert "is written in braces" in capsys.readouterr().err


def test_fix_keeps_the_indentation_and_the_run(tmp_path, capsys):
    file = tmp_path / "indented.yaml"
    file.write_text(
        "  torch_dtype: float16\n  max_length: 12\n  packing_strategy: bfd-requeue\n  group_by_length: false\n"
    )
    cli.main(["check", "--for", "sft", "--fix", str(file)])
    assert read_recipe(file) == {"dtype": "float16", "max_length": 12, "packing_strategy": "bfd_split"}
    file.write_text("use_liger: true\nuse_liger_loss: false\n")  # two old names of one key
    cli.main(["check", "--for", "sft", "--fix", str(file)])
    assert read_recipe(file) == {"use_liger_kernel": False}
    assert "`train_sampling_strategy: group_by_length`; in place of `false` nothing." in capsys.readouterr().err


@pytest.mark.parametrize("verb", SCRIPTS)
def test_the_table_holds_for_the_installed_versions(verb):
    """A key that TRL or transformers has again must leave the table; a new name must exist somewhere."""
    keys = schemas.load(verb)
    assert not {*renamed.RENAMED, *renamed.REMOVED} & keys.keys()
    everywhere = {key for one in SCRIPTS for key in schemas.load(one)}
    assert {*renamed.RENAMED.values(), *(key for key, _ in renamed.REWRITTEN.values())} <= everywhere


def parsed(parser, tmp_path, values):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    *configs, _ = parser.parse_args_and_config(["--config", str(file)], return_remaining_strings=True)
    return {key: value for config in configs for key, value in vars(config).items()}


def trl_parser(verb):
    """The parser of TRL's own script, with the config that ours derives from."""
    ours = next(one for one in SCRIPTS[verb].make_parser().dataclass_types if one.__name__.endswith("Config"))
    config = next(base for base in ours.__mro__ if base.__module__.startswith("trl."))
    return trl.TrlParser((trl.ScriptArguments, config, trl.ModelConfig, trl.DatasetMixtureConfig), allow_abbrev=False)


@pytest.mark.parametrize("verb", SCRIPTS)
def test_a_scalar_is_a_list_of_one(verb, tmp_path):
    """As on the command line. TRL's parser takes it from a recipe too, and leaves the scalar to whoever reads the field."""
    keys = schemas.load(verb)
    items = {"list[str]": "lm_head", "list[float]": 1.0, "list[int]": 1}
    given = {
        key: items[kind]
        for key, entry in keys.items()
        for kind in entry["types"]
        if kind in items and "str" not in entry["types"] and key not in ("advantage_shapers", "reward_funcs")
    }
    assert {"lora_target_modules", "lora_modules_to_save"} <= given.keys()
    values = parsed(SCRIPTS[verb].make_parser(), tmp_path, START | given)
    for key, value in given.items():
        assert values[key] == (value if key == "lora_target_modules" else [value]), key  # which TRL unpacks
    theirs = parsed(
        trl_parser(verb), tmp_path, START | {key: given[key] for key in given.keys() - schemas.own_keys(verb).keys()}
    )
    assert theirs["lora_target_modules"] == "lm_head"
    errors = check(tmp_path / "recipe.yaml", START | {"output_dir": "out"} | given, verb).errors
    assert [error for error in errors if " must be " in error] == []


def test_a_shaper_and_a_reward_without_a_list(tmp_path):
    recipe = read_recipe(find_recipe("edas/tiny-cpu")) | {
        "advantage_shapers": "edas",
        "reward_funcs": "exact_answer_reward",
    }
    assert check(tmp_path / "recipe.yaml", recipe, "grpo").errors == []
    values = parsed(grpo.make_parser(), tmp_path, recipe)
    assert (values["advantage_shapers"], values["reward_funcs"]) == (["edas"], ["exact_answer_reward"])


@pytest.mark.parametrize("verb", SCRIPTS)
def test_numbers_as_text(verb, tmp_path):
    keys = schemas.load(verb)
    given = {
        key: str(entry["default"])
        for key, entry in keys.items()
        if isinstance(entry.get("default"), int | float) and not isinstance(entry["default"], bool)
    }
    assert len(given) > 20
    ours = parsed(SCRIPTS[verb].make_parser(), tmp_path, START | given)
    plain = parsed(SCRIPTS[verb].make_parser(), tmp_path, START)
    assert {key: ours[key] for key in given} == {key: plain[key] for key in given}
    errors = check(tmp_path / "recipe.yaml", START | {"output_dir": "out"} | given, verb).errors
    assert [error for error in errors if " must be " in error] == []


def test_booleans_for_text(tmp_path):
    """YAML reads `no` as false. TRL has a meaning for a boolean under one key; elsewhere it would go on as a boolean."""
    for value, meaning in ((False, "none"), (True, "group")):
        recipe = START | {"output_dir": "out", "dataset_config": "prompt_only", "scale_rewards": value}
        assert (
            parsed(trl_parser("grpo"), tmp_path, {"scale_rewards": value, "bf16": False, "use_cpu": True})[
                "scale_rewards"
            ]
            == meaning
        )
        assert not [error for error in check(tmp_path / "r.yaml", recipe, "grpo").errors if "scale_rewards" in error]
    for verb in SCRIPTS:
        for key, entry in schemas.load(verb).items():
            if "str" in entry["types"] and "bool" not in entry["types"] and "any" not in entry["types"]:
                (error,) = [
                    error
                    for error in check(tmp_path / "r.yaml", START | {"output_dir": "out", key: False}, verb).errors
                    if error.startswith(f"`{key}` must be")
                ]
                assert "YAML reads no, off, yes and on as booleans" in error
