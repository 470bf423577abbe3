"""Which parts of a model are packed."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rb import _compat
from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.experts import fused_experts, projections
from hf_rb.quantizers.readers import note_readers


if TYPE_CHECKING:
    from hf_rb.quantizers.backend import PackingQuantizer

__all__ = ["packable", "setting"]

logger = logging.get_logger(__name__)

QK = ["q_proj", "k_proj"]

Value = TypeVar("Value")


def packable(model: nn.Module, quantizer: "PackingQuantizer") -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yields what is to be packed: a linear layer or fused experts, and which of its weights; the report gets the rest."""
    config, skipped = quantizer.quantization_config, quantizer.report.skipped
    modules = dict(model.named_modules())
    experts = {name: weights for name, module in modules.items() if (weights := fused_experts(name, module))}
    blocks = {name.rpartition(".")[0] for name in experts}
    weights = [f"{name}.{weight}" for name in experts for weight in experts[name]]
    settings = getattr(config, quantizer.per_layer) or {}
    if not quantizer.pre_quantized:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        patterns = [*_skips(config), *settings]
        _check_patterns(patterns, [*modules, *weights], [*linear, *weights], type(model).__name__)
    stays = _stays(model, quantizer)

    def left(name: str, module: nn.Module) -> bool:
        router = name.rpartition(".")[0] in blocks or "router" in name
        return router or stays(name) or type(module) is not nn.Linear  # a subclass computes something else

    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in experts]
    read = note_readers(model, quantizer, [name for name in linear if not left(name, modules[name])], _means)
    unknown, packed = {}, []
    for name, module in modules.items():
        if name in experts:
            known = projections(module)
            if known is None and not stays(name):
                unknown[name] = module
            chosen = [weight for weight in known or () if not stays(name) and not stays(f"{name}.{weight}")]
            skipped += [f"{name}.{weight}" for weight in experts[name] if weight not in chosen]
            if chosen:
                packed += [name, *(f"{name}.{weight}" for weight in chosen)]
                yield name, module, chosen
        elif isinstance(module, nn.Linear):
            if left(name, module) or (name in read and not quantizer.pre_quantized):
                skipped.append(name)
                continue
            packed.append(name)
            yield name, module, ["weight"]
    if quantizer.pre_quantized:
        return
    for pattern in settings:
        if packed and not any(_means(pattern, name) for name in packed):
            raise ValueError(
                f"`{quantizer.per_layer}` has {pattern!r}, which matches nothing of {type(model).__name__} that is quantized: "
                "leave it out, or let what it names be quantized."
            )
    if unknown:
        weights = sum(modules[name].get_parameter(weight).numel() for name in unknown for weight in experts[name])
        kinds = ", ".join(sorted({type(module).__name__ for module in unknown.values()}))
        logger.warning(
            f"{config.method} leaves {weights / 1e6:.1f}M weights of {type(model).__name__} as they are: it does not know how "
            f"the fused experts of {kinds} are laid out."
        )


def setting(by_pattern: Mapping[str, Value] | None, default: Value, *names: str) -> Value:
    """Returns what the first pattern that means one of the names says, or the default."""
    for pattern, value in (by_pattern or {}).items():
        if any(_means(pattern, name) for name in names):
            return value
    return default


def _stays(model: nn.Module, quantizer: "PackingQuantizer") -> Callable[[str], bool]:
    """Returns whether what has a name is to stay as it is."""
    patterns = _skips(quantizer.quantization_config)
    in_fp32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    skip = quantizer.get_modules_to_not_convert(model, None, in_fp32, add_default_skips=True)
    inside = _language_model(model)
    return lambda name: (
        not name.startswith(inside)
        or not _compat.should_convert_module(name, skip)
        or any(_means(pattern, name) for pattern in patterns)
    )


def _skips(config: PackedConfig) -> list[str]:
    return [*(config.modules_to_not_convert or []), *([] if getattr(config, "quantize_qk", True) else QK)]


def _language_model(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that a quantization is for: any, or those of a multimodal model's language model."""
    text = model.config.get_text_config()
    if text is model.config:
        return ("",)
    models = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and name)
    return tuple(f"{name}." for name, module in models if module.config is text) or ("",)


def _means(pattern: str, name: str) -> bool:
    # As in transformers, but an ending has whole components: `up_proj` is not one half of `gate_up_proj`.
    return bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)) or f".{name}".endswith(f".{pattern}")


def _check_patterns(patterns: list[str], names: list[str], weights: Iterable[str], model: str) -> None:
    for pattern in patterns:
        if any(_means(pattern, name) for name in names):
            continue
        if pattern in QK:
            raise ValueError(
                f"quantize_qk=False: {model} has no {pattern}. Name the projections to keep in `modules_to_not_convert`."
            )
        endings = sorted({end for name in weights if not (end := name.rpartition(".")[2]).isdigit()})
        last = pattern.rpartition(".")[2]
        close = [end for end in endings if end.endswith(last)] or get_close_matches(last, endings, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"its weights are {', '.join(endings)}."
        raise ValueError(f"{pattern!r} matches no module of {model}; {hint}")
