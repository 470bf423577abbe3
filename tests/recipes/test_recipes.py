import inspect
from importlib import import_module

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_rb.cli.check import check, read_recipe
from hf_rb.cli.quantize import QuantizeArguments
from hf_rb.cli.upcycle import UpcycleArguments
from hf_rb.io.resources import resource_folder
from hf_rb.methods.registry import entries
from hf_rb.recover import RecoverConfig


FOLDER = resource_folder("recipes")
ALL = sorted(FOLDER.rglob("*.yaml"))
ACCELERATE = [path for path in ALL if path.parent.name == "accelerate_configs"]
RECIPES = [path for path in ALL if path not in ACCELERATE]
KINDS = {"objective": "gkd", "shaper": "grpo", "quantizer": "quantize"}
VERBS = {entry.method.key: KINDS.get(entry.method.kind) for entry in entries()} | {
    "recover": "recover",
    "profit": "sft",
    "shadow_ft": "sft",
    "llm_neo": "gkd",
    "loca": "gkd",
    "exopd": "distillation",
    "mpi": "upcycle",
    "mpi/tiny-cpu-sft": "sft",
    "mpi/qwen3-0.6b-sft": "sft",
}


def named(paths) -> list:
    return [pytest.param(path, id=path.relative_to(FOLDER).with_suffix("").as_posix()) for path in paths]


@pytest.mark.parametrize("path", named(RECIPES))
def test_check_finds_nothing_in_the_recipe(path):
    report = check(path, read_recipe(path))
    assert not report.errors + report.warnings
    # The folder of a method says which verb its recipes are for, but for some of them.
    name = path.relative_to(FOLDER).with_suffix("").as_posix()
    assert report.verb == VERBS.get(name, VERBS[path.relative_to(FOLDER).parts[0]])


@pytest.mark.parametrize("path", named(RECIPES))
def test_the_config_classes_take_the_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb = check(path, read_recipe(path)).verb
    if verb == "quantize":
        config = QuantizeArguments(**read_recipe(path)).quantization_config
        assert AutoQuantizationConfig.from_dict(config).quant_method == config["quant_method"]
    elif verb == "recover":
        config = RecoverConfig(**read_recipe(path)).quantization_config
        assert AutoQuantizationConfig.from_dict(config).quant_method == config["quant_method"]
    elif verb == "upcycle":
        assert UpcycleArguments(**read_recipe(path)).num_experts == read_recipe(path)["num_experts"]
    else:  # on the CPU, since a recipe for a GPU is tested without one
        parser = import_module(f"hf_rb.scripts.{verb}").make_parser()
        parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])


@pytest.mark.parametrize("path", named(ACCELERATE))
def test_accelerate_takes_its_config(path):
    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert written.keys() <= inspect.signature(type(config)).parameters.keys()
    assert config.num_processes == written["num_processes"]


def test_recipes_name_their_model_and_output_folder():
    for path in RECIPES:
        assert {"model_name_or_path", "output_dir"} <= read_recipe(path).keys(), path
