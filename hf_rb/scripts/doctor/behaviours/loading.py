"""Checks of names that quantizers rely on: registration, conversion of tensors, attributes of models."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_rb import PTQTPConfig, tiny
from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer
from hf_rb.scripts.doctor.behaviours import relies_on
from hf_rb.scripts.doctor.findings import expect
from hf_rb.utils import compat


__all__: list[str] = []


def _empty(member: str = "moe") -> PreTrainedModel:
    """Returns a member of the embedded family without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.path(member)))


def _quantized(config: PTQTPConfig | None = None, member: str = "student") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.path(member), quantization_config=config or PTQTPConfig())


@relies_on("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
def find_methods() -> None:
    """Transformers makes our config and our quantizer from a checkpoint's `quant_method`."""
    from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict({"quant_method": "ptqtp"})
    expect(type(config) is PTQTPConfig, f"`quant_method: ptqtp` makes a {type(config).__name__}.")
    quantizer = AutoHfQuantizer.from_config(config)
    expect(type(quantizer) is PTQTPQuantizer, f"PTQTPConfig makes a {type(quantizer).__name__}.")


@relies_on("LOADING_ATTRIBUTES_CONFIG_TYPES")
def merge_loading_attributes() -> None:
    """Attributes that a user gives while loading override those that the checkpoint stores."""
    from transformers.quantizers import AutoHfQuantizer

    merged: Any = AutoHfQuantizer.merge_quantization_configs({"quant_method": "ptqtp"}, PTQTPConfig(dequantize=True))
    expect(merged.dequantize, "`dequantize=True` of the user is lost.")


@relies_on("CONFIG_MAPPING", "_extra_content")
def find_model_types() -> None:
    """Transformers makes our configuration from a checkpoint's `model_type`."""
    from hf_rb import MPIMixtralConfig

    config = AutoConfig.for_model("mpi_mixtral")
    expect(type(config) is MPIMixtralConfig, f"`model_type: mpi_mixtral` makes a {type(config).__name__}.")
    expect("mpi_mixtral" in compat.CONFIG_MAPPING._extra_content, "Types that are added are kept elsewhere.")


@relies_on(
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
    "_dequantize",
    "_weight_conversions",
    "ConversionOps",
)
def load_and_dequantize() -> None:
    """A quantizer is called before and after loading and to dequantize; the conversions to save with stay on the
    model.
    """
    model = _quantized()
    conversions = model._weight_conversions
    expect(isinstance(conversions, list), f"`_weight_conversions` is a {type(conversions).__name__}.")
    expect(hasattr(model.model.layers[0].mlp.up_proj, "layouts"), "No layer is packed.")
    model.dequantize()
    expect(type(model.model.layers[0].mlp.up_proj) is nn.Linear, "`dequantize` does not call the quantizer.")
    expect(isinstance(model._weight_conversions, list), "`dequantize` loses the conversions to save with.")


@relies_on(
    "WeightConverter",
    "WeightRenaming",
    "MergeModulelist",
    "Concatenate",
    "get_model_conversion_mapping",
    "_original_source_patterns",
    "_original_target_patterns",
)
def convert_experts() -> None:
    """The experts of a mixture are stacked by `MergeModulelist`, and their gate and up projections joined by
    `Concatenate`.
    """
    config = AutoConfig.from_pretrained(tiny.path("moe"))
    rules = compat.get_model_conversion_mapping(_empty())
    converters = [rule for rule in rules if isinstance(rule, compat.WeightConverter)]
    operations = [type(operation) for rule in converters for operation in rule.operations]
    expect(
        {compat.MergeModulelist, compat.Concatenate} <= set(operations), f"{config.model_type} is converted otherwise."
    )
    joined = next(rule for rule in converters if len(rule._original_source_patterns) == 2)
    expect("gate_up_proj" in joined._original_target_patterns[0], "The patterns of files and of memory changed sides.")
    sources, targets = list(joined._original_source_patterns), list(joined._original_target_patterns)
    same = joined.copy(sources, targets, operations=list(joined.operations))
    expect(same is not joined and isinstance(same, compat.WeightConverter), "A converter's copy is something else.")
    renaming = compat.WeightRenaming("old", "new")
    expect(renaming._original_source_patterns == ["old"], "A renaming keeps its patterns elsewhere.")
    stacked = compat.MergeModulelist(dim=0).convert(
        {"x": [torch.ones(2), torch.zeros(2)]}, source_patterns=["x"], target_patterns=["y"]
    )
    expect(next(iter(stacked.values())).shape == (2, 2), "`MergeModulelist(dim=0)` does not stack.")


@relies_on("rename_source_key")
def rename_keys() -> None:
    """`rename_source_key` returns a parameter's name and the pattern of the converter that makes it."""
    model = _empty()
    rules = compat.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, compat.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, compat.WeightConverter)]
    name, pattern = compat.rename_source_key(
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        renamings,
        converters,
        model.base_model_prefix,
        model.state_dict(),
    )
    expect(name.endswith("experts.gate_up_proj") and pattern, f"An expert's gate projection goes to {name}.")


@relies_on("IdentityOp")
def identity_operation() -> None:
    """`_IdentityOp` hands on what it is given."""
    given = {"weight": torch.zeros(1)}
    expect(compat.IdentityOp().convert(given)["weight"] is given["weight"], "`_IdentityOp` changes a tensor.")


@relies_on("load_state_dict")
def read_headers() -> None:
    """`load_state_dict(file, map_location="meta")` reads names and shapes without the weights."""
    tensors = compat.load_state_dict(str(tiny.path("student") / "model.safetensors"), map_location="meta")
    expect(tensors and all(tensor.is_meta for tensor in tensors.values()), "Weights are read too.")


@relies_on("should_convert_module")
def leave_modules_out() -> None:
    """`should_convert_module` takes a layer by the end of its name, and not by a part of a component."""
    answers = [compat.should_convert_module(name, ["fc1", "layers.1"]) for name in ("a.fc1", "layers.11.x", "a.fc2")]
    expect(answers == [False, True, True], f"`a.fc1`, `layers.11.x`, `a.fc2` without `fc1`, `layers.1`: {answers}.")


@relies_on("PreTrainedModel._from_config", "PreTrainedModel.num_parameters")
def models_from_configs() -> None:
    """`_from_config` makes a model of the class it is called on, and `num_parameters` counts the weights of packed
    layers.
    """
    config = AutoConfig.from_pretrained(tiny.path("student"))
    plain = AutoModelForCausalLM.from_config(config)
    again = type(plain)._from_config(copy.deepcopy(config))
    expect(type(again) is type(plain), f"`_from_config` makes a {type(again).__name__}.")
    expect(_quantized().num_parameters() == plain.num_parameters(), "Weights of packed layers are counted otherwise.")


@relies_on("PreTrainedModel._get_dtype_plan", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
def keep_in_fp32() -> None:
    """Modules of `_keep_in_fp32_modules_strict` stay in float32, and `_get_dtype_plan` lists them by pattern."""
    model = _empty("student")
    expect(not model._keep_in_fp32_modules, "The embedded student has modules in float32.")
    model._keep_in_fp32_modules_strict = {"norm"}
    plan = model._get_dtype_plan(torch.bfloat16)
    expect(plan == {"norm": torch.float32}, f"`_get_dtype_plan` returns {plan}.")


@relies_on(
    "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save", "_name_or_path"
)
def ignored_keys() -> None:
    """A model has lists of tensors that a file may lack or have beside, or `None`; its configuration knows its
    name.
    """
    model = _empty("student")
    for name in ("load_missing", "load_unexpected", "save"):
        value = getattr(model, f"_keys_to_ignore_on_{name}")
        expect(value is None or not isinstance(value, str), f"`_keys_to_ignore_on_{name}` is {value!r}.")
    expect(model.config._name_or_path == str(tiny.path("student")), "The configuration has another name of the model.")


@relies_on("_is_hf_initialized")
def mark_loaded() -> None:
    """The loader marks a parameter that the file has, and the ones that it has made up are not marked."""
    model = _quantized()
    norm = model.model.norm.weight
    expect(getattr(norm, "_is_hf_initialized", False), "What is loaded has no mark.")
    expect(not hasattr(nn.Parameter(norm.detach().clone()), "_is_hf_initialized"), "Every parameter has the mark.")


@relies_on("_is_quantized")
def mark_quantized() -> None:
    """A quantized model's configuration says so to the code that casts the inputs of attention."""
    expect(_quantized().config._is_quantized, "The configuration of a quantized model has no `_is_quantized`.")


@relies_on("load_offloaded_parameter", "_hf_hook", "_old_forward")
def offloaded() -> None:
    """A layer that accelerate offloads is run by its hook, which calls the forward put aside and knows where the
    weight is.
    """
    from accelerate import cpu_offload

    layer: Any = nn.Sequential(nn.Linear(2, 2))
    weight = layer[0].weight.detach().clone()
    cpu_offload(layer, torch.device("cpu"))
    expect(hasattr(layer[0], "_hf_hook") and callable(layer[0]._old_forward), "No hook stands before the forward.")
    expect(layer[0].weight.is_meta, "The weight of an offloaded layer is in memory.")
    found: Any = compat.load_offloaded_parameter(layer, "0.weight")
    expect(torch.equal(found, weight), "`load_offloaded_parameter` returns another tensor.")


@relies_on("TASK_MAPPING")
def task_of_a_class() -> None:
    """`TASK_MAPPING` has the mapping of the classes of a task by the task's name on the Hub."""
    classes = compat.TASK_MAPPING["text-generation"].values()
    expect("Qwen3ForCausalLM" in classes, "Text generation is another task.")
