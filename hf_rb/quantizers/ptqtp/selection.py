"""Which parts of a model are packed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rb import _compat
from hf_rb.quantizers.ptqtp.config import PTQTPConfig
from hf_rb.quantizers.ptqtp.experts import PTQTPExperts, fused_experts, projections
from hf_rb.quantizers.ptqtp.linear import PackedModule, PTQTPLinear


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer

__all__ = ["packable"]

logger = logging.get_logger(__name__)

QK = ["q_proj", "k_proj"]


def packable(model: nn.Module, quantizer: "PTQTPQuantizer") -> Iterator[tuple[str, PackedModule]]:
    """Yields the packed stand-ins of what is to be quantized; the report gets the rest."""
    config, skipped = quantizer.quantization_config, quantizer.report.skipped
    modules = dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if fused_experts(name, module)}
    routers = {name.rpartition(".")[0] for name in experts}  # where what chooses among experts is
    names = [
        *modules,
        *(f"{name}.{parameter}" for name, module in experts.items() for parameter in module._parameters),
    ]
    patterns = [*(config.modules_to_not_convert or []), *([] if config.quantize_qk else QK)]
    if not quantizer.pre_quantized:
        _check_patterns(config, patterns, names, type(model).__name__)
    in_fp32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    skip = quantizer.get_modules_to_not_convert(model, patterns, in_fp32, add_default_skips=True)
    language = _language_model(model)
    unknown = []
    for name, module in modules.items():
        inside = any(name == prefix or name.startswith(prefix) for prefix in language)
        if name in experts:
            weights = [n for n, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            known = projections(module)
            if known is None:
                unknown.append((name, module))
            planes = {
                parameter: _planes(config, f"{name}.{parameter}", name)
                for parameter in known or ()
                if inside
                and not any(_matches(pattern, path) for pattern in skip for path in (name, f"{name}.{parameter}"))
            }
            skipped += [f"{name}.{parameter}" for parameter in weights if parameter not in planes]
            if planes:
                yield name, PTQTPExperts(module, config, planes)
        elif isinstance(module, nn.Linear):
            parent = name.rpartition(".")[0]
            # A subclass computes something else.
            if (
                type(module) is not nn.Linear
                or parent in routers
                or not inside
                or not _compat.should_convert_module(name, skip)
            ):
                skipped.append(name)
                continue
            size = module.in_features, module.out_features, module.bias is not None
            weight = module.weight
            yield name, PTQTPLinear(*size, config, _planes(config, name), weight.device, weight.dtype)
    if unknown and not quantizer.pre_quantized:
        weights = sum(parameter.numel() for _, module in unknown for parameter in module.parameters(recurse=False))
        kinds = ", ".join(sorted({type(module).__name__ for _, module in unknown}))
        logger.warning(
            f"PTQTP leaves {weights / 1e6:.1f}M weights of {type(model).__name__} as they are: it does not know how the fused "
            f"experts of {kinds} are laid out."
        )


def _language_model(model: nn.Module) -> list[str]:
    """Prefixes of the modules that a quantization is for: all of them, or those of a multimodal model's language model."""
    text = model.config.get_text_config()
    if text is model.config:
        return [""]
    inside = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config is text and name
    ]
    return inside or [""]


def _planes(config: PTQTPConfig, *names: str) -> int:
    for pattern, planes in (config.planes_per_layer or {}).items():
        if any(_matches(pattern, name) for name in names):
            return planes
    return config.planes


def _matches(pattern: str, name: str) -> bool:
    return not _compat.should_convert_module(name, [pattern])


def _check_patterns(config: PTQTPConfig, patterns: list[str], names: list[str], model: str) -> None:
    for pattern in [*patterns, *(config.planes_per_layer or {})]:
        if any(_matches(pattern, name) for name in names):
            continue
        if pattern in QK:
            raise ValueError(
                f"quantize_qk=False: {model} has no {pattern}. Name the projections to keep in `modules_to_not_convert`."
            )
        endings = sorted({name.rpartition(".")[2] for name in names} - {""})
        raise ValueError(f"{pattern!r} matches no module of {model}; names end in {', '.join(endings)}.")
