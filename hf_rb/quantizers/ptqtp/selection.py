"""Which parts of a model are packed."""

from collections.abc import Callable, Iterator
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
    experts = {name: weights for name, module in modules.items() if (weights := fused_experts(name, module))}
    blocks = {name.rpartition(".")[0] for name in experts}
    stays = _stays(model, quantizer, [*modules, *(f"{name}.{weight}" for name in experts for weight in experts[name])])
    unknown = {}
    for name, module in modules.items():
        if name in experts:
            known = projections(module)
            if known is None and not stays(name):
                unknown[name] = module
            planes = {
                weight: _planes(config, f"{name}.{weight}", name)
                for weight in known or ()
                if not stays(name) and not stays(f"{name}.{weight}")
            }
            skipped += [f"{name}.{weight}" for weight in experts[name] if weight not in planes]
            if planes:
                yield name, PTQTPExperts(module, config, planes)
        elif isinstance(module, nn.Linear):
            router = name.rpartition(".")[0] in blocks or "router" in name
            if router or stays(name) or type(module) is not nn.Linear:  # a subclass computes something else
                skipped.append(name)
                continue
            size = module.in_features, module.out_features, module.bias is not None
            weight = module.weight
            yield name, PTQTPLinear(*size, config, _planes(config, name), weight.device, weight.dtype)
    if unknown and not quantizer.pre_quantized:
        weights = sum(modules[name].get_parameter(weight).numel() for name in unknown for weight in experts[name])
        kinds = ", ".join(sorted({type(module).__name__ for module in unknown.values()}))
        logger.warning(
            f"PTQTP leaves {weights / 1e6:.1f}M weights of {type(model).__name__} as they are: it does not know how the fused "
            f"experts of {kinds} are laid out."
        )


def _stays(model: nn.Module, quantizer: "PTQTPQuantizer", names: list[str]) -> Callable[[str], bool]:
    """Returns whether what has a name is to stay as it is; `names` are those that patterns may mean."""
    config = quantizer.quantization_config
    patterns = [*(config.modules_to_not_convert or []), *([] if config.quantize_qk else QK)]
    if not quantizer.pre_quantized:
        _check_patterns(config, patterns, names, type(model).__name__)
    in_fp32 = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    skip = quantizer.get_modules_to_not_convert(model, patterns, in_fp32, add_default_skips=True)
    inside = _language_model(model)
    return lambda name: not name.startswith(inside) or not _compat.should_convert_module(name, skip)


def _language_model(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that a quantization is for: any, or those of a multimodal model's language model."""
    text = model.config.get_text_config()
    if text is model.config:
        return ("",)
    models = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and name)
    return tuple(f"{name}." for name, module in models if module.config is text) or ("",)


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
