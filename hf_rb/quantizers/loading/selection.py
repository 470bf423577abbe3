"""Selection of the parts of a model that are packed."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.loading.heads import heads, packed_parameters
from hf_rb.quantizers.loading.readers import note_readers
from hf_rb.quantizers.packed.experts import fused_experts, projections
from hf_rb.quantizers.packed.layer_kinds import LINEAR, is_linear_map
from hf_rb.utils import compat


__all__ = ["Selection", "select", "setting"]

logger = logging.get_logger(__name__)

QK = ["q_proj", "k_proj"]

Value = TypeVar("Value")


@dataclass
class Selection:
    """
    Parts of a model that are packed.

    Attributes:
        config ([`PackedConfig`]): The configuration that is stored: as given, or a copy that also names the layers
            with readers.
        packed (`list[tuple[str, nn.Module, list[str]]]`): Linear layers and fused experts, and which of their weights.
        skipped (`list[str]`): Linear layers and weights of experts that stay as they are.
        readers (`dict[str, str]`): Of these the linear layers with a `weight` that other code reads, with the function
            that does.
    """

    config: PackedConfig
    packed: list[tuple[str, nn.Module, list[str]]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)


def select(
    model: PreTrainedModel,
    config: PackedConfig,
    pre_quantized: bool,
    files: Sequence[str | Path] | None,
) -> Selection:
    """
    Decides which parts of a model are packed.

    Args:
        model (`transformers.PreTrainedModel`):
            Model on the meta device.
        config ([`PackedConfig`]):
            Names the parts that stay as they are.
        pre_quantized (`bool`):
            Whether the files of the model are quantized.
        files (`Sequence[str | Path]`, *optional*):
            These files. Where it is in doubt what is packed, they tell.

    Raises:
        ValueError: Nothing can be packed, or a pattern of the configuration means nothing.
    """
    found = Selection(config)
    modules = dict(model.named_modules())
    experts = {name: weights for name, module in modules.items() if (weights := fused_experts(name, module))}
    blocks = {name.rpartition(".")[0] for name in experts}
    weights = [f"{name}.{weight}" for name in experts for weight in experts[name]]
    per_layer = config.record.per_layer
    settings = getattr(config, per_layer, None) or {}
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR) and name not in experts]
    if not pre_quantized:
        patterns = [*_skips(config), *settings]
        _check_patterns(patterns, [*modules, *weights], [*linear, *experts, *weights], type(model).__name__)
    stays, in_doubt = _stays(model, config), _in_doubt(model, files if pre_quantized else None)

    def left(name: str, module: nn.Module) -> bool:
        router = name.rpartition(".")[0] in blocks or "router" in name
        return router or stays(name) or not is_linear_map(module) or in_doubt(name, module)

    candidates = [name for name in linear if not left(name, modules[name])]
    found.readers, found.config = note_readers(model, candidates, config, pre_quantized, _means)
    # A layer of a packed checkpoint that is read is loaded as it is stored, and then unpacked.
    to_pack = {name for name in candidates if pre_quantized or name not in found.readers}
    unknown, packed = {}, []
    for name, module in modules.items():
        if name in experts:
            known = projections(module)
            if known is None and not stays(name):
                unknown[name] = module
            chosen = [weight for weight in known or () if not stays(name) and not stays(f"{name}.{weight}")]
            found.skipped += [f"{name}.{weight}" for weight in experts[name] if weight not in chosen]
            if chosen:
                packed += [name, *(f"{name}.{weight}" for weight in chosen)]
                found.packed.append((name, module, chosen))
        elif isinstance(module, LINEAR):
            if name not in to_pack:
                found.skipped.append(name)
                continue
            packed.append(name)
            found.packed.append((name, module, ["weight"]))
    for pattern in settings if not pre_quantized else ():
        if packed and not any(_means(pattern, name) for name in packed):
            raise ValueError(
                f"`{per_layer}` has {pattern!r}, which matches nothing of {type(model).__name__} that is quantized: "
                "leave it out, or let what it names be quantized."
            )
    if unknown and not pre_quantized:
        weights = sum(modules[name].get_parameter(weight).numel() for name in unknown for weight in experts[name])
        kinds = ", ".join(sorted({type(module).__name__ for module in unknown.values()}))
        logger.warning(
            f"{config.record.name} leaves {weights / 1e6:.1f}M weights of {type(model).__name__} as they are: it does "
            f"not know how the fused experts of {kinds} are laid out."
        )
    if not found.packed:
        raise ValueError(_nothing_to_pack(model, config.record.name, len(found.skipped)))
    return found


def setting(by_pattern: Mapping[str, Value] | None, default: Value, *names: str) -> Value:
    """Returns what the first pattern that means one of the names says, or the default."""
    for pattern, value in (by_pattern or {}).items():
        if any(_means(pattern, name) for name in names):
            return value
    return default


def _stays(model: PreTrainedModel, config: PackedConfig) -> Callable[[str], bool]:
    """Returns whether what has a name is to stay as it is."""
    patterns = _skips(config)
    in_fp32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    skip = HfQuantizer.get_modules_to_not_convert(model, None, in_fp32, add_default_skips=True)
    inside = _language_model(model)
    return lambda name: (
        not name.startswith(inside)
        or not compat.should_convert_module(name, skip)
        or any(_means(pattern, name) for pattern in patterns)
    )


def _in_doubt(model: PreTrainedModel, files: Sequence[str | Path] | None) -> Callable[[str, nn.Module], bool]:
    """
    Returns whether a linear layer stays as it is for being a head, or for having been left out by an earlier version.

    Earlier versions packed some heads, and no layer of a subclass: there the `files` of a quantized checkpoint say
    what is packed.
    """
    inside, stored = heads(model), None

    def stays(name: str, module: nn.Module) -> bool:
        nonlocal stored
        is_head = any(f"{name}.".startswith(f"{head}.") for head in inside)
        if not files:
            return is_head
        if not is_head and type(module) is nn.Linear:
            return False
        stored = packed_parameters(model, files) if stored is None else stored
        return f"{name}.weight" not in stored

    return stays


def _nothing_to_pack(model: nn.Module, method: str, left: int) -> str:
    """Says why there is nothing to quantize in a model, and what it has."""
    holders = [module for module in model.modules() if any(p.ndim > 1 for p in module.parameters(recurse=False))]
    seen = Counter(type(module).__name__ for module in holders).most_common()
    return (
        f"There is nothing to quantize in {type(model).__name__}: its weights are in "
        f"{', '.join(f'{n} {kind}' for kind, n in seen)}. {method} packs layers that compute what `nn.Linear` does, "
        f"Conv1D of GPT-2 and fused experts; heads, routers and `modules_to_not_convert` stay as they are ({left} "
        "here)."
    )


def _skips(config: PackedConfig) -> list[str]:
    return [*(config.modules_to_not_convert or []), *([] if getattr(config, "quantize_qk", True) else QK)]


def _language_model(model: PreTrainedModel) -> tuple[str, ...]:
    """Prefixes of the modules that a quantization is for: any, or those of a multimodal model's language model."""
    text = model.config.get_text_config()
    if text is model.config:
        return ("",)
    models = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and name)
    return tuple(f"{name}." for name, module in models if module.config is text) or ("",)


def _means(pattern: str, name: str) -> bool:
    # As in transformers, but an ending has whole components: `up_proj` is not one half of `gate_up_proj`.
    return bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)) or f".{name}".endswith(f".{pattern}")


def _check_patterns(patterns: list[str], names: list[str], weights: list[str], model: str) -> None:
    for pattern in patterns:
        if meant := [name for name in names if _means(pattern, name)]:
            whole = next((name for name in meant if any(each.startswith(f"{name}.") for each in weights)), None)
            if whole and not any(_means(pattern, name) for name in weights):
                raise ValueError(
                    f"{pattern!r} is the ending of {whole}, which holds linear layers, and an ending does not reach "
                    f"into a module: write {whole!r}, or '.*{pattern}' for all modules that end so."
                )
            continue
        if pattern in QK:
            raise ValueError(
                f"quantize_qk=False: {model} has no {pattern}. Name the projections to keep in "
                "`modules_to_not_convert`."
            )
        endings = sorted({end for name in weights if not (end := name.rpartition(".")[2]).isdigit()})
        last = pattern.rpartition(".")[2]
        close = [end for end in endings if end.endswith(last)] or get_close_matches(last, endings, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"its weights are {', '.join(endings)}."
        raise ValueError(f"{pattern!r} matches no module of {model}; {hint}")
