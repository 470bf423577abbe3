"""Puts what was found for a decoder layer into the model: quantized linear layers, and corrections as biases."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_rb.quantizers.d2quant.biases import set_bias
from hf_rb.quantizers.d2quant.calibrate.kept import LayerResult
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.layers import D2QuantLinear
from hf_rb.quantizers.d2quant.maths.dac import fold


__all__ = ["name_of", "put_in_place"]


def put_in_place(
    model: PreTrainedModel,
    final_norm: nn.Module | None,
    config: D2QuantConfig,
    result: LayerResult,
    shifted: tuple[str, ...] | None,
    norm: str | None,
) -> list[str]:
    """
    Replaces the linear layers of a decoder layer, and adds its corrections to biases.

    Args:
        model (`transformers.PreTrainedModel`):
            The model.
        final_norm (`nn.Module`, *optional*):
            Its final norm.
        config ([`D2QuantConfig`]):
            Says where corrections go (`dac_mode`).
        result ([`LayerResult`]):
            What was found.
        shifted (`tuple[str, ...]`, *optional*):
            The linear layers that read what is corrected.
        norm (`str`, *optional*):
            The norm that keeps the correction; otherwise it is folded into `shifted`.

    Returns:
        `list[str]`: Modules that had no bias before.
    """
    added: list[str] = []
    if result.shift is not None:
        added += _set_shift(model, result.shift, cast(tuple[str, ...], shifted), norm, result.codes)
    if result.final_shift is not None:
        head: nn.Module | None = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no head, so nothing reads the correction of its final norm.")
        has_weight = getattr(final_norm, "weight", None) is not None
        keeper = final_norm if config.dac_mode == "norm_bias" and has_weight else None
        keeps = None if keeper is None else name_of(model, keeper)
        added += _set_shift(model, result.final_shift, (name_of(model, head),), keeps, {})
    for name, codes in result.codes.items():
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, D2QuantLinear.from_codes(codes, linear.bias).stand_in_for(linear))
    return added


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Returns the full name of a module."""
    return next(name for name, one in model.named_modules() if one is module)


def _set_shift(model: nn.Module, shift: Tensor, readers: tuple[str, ...], norm: str | None, codes: dict) -> list[str]:
    if not shift.any():  # behind an attention that stays as it is
        return []
    if norm is not None:
        module: Any = model.get_submodule(norm)
        biases = {norm: shift if getattr(module, "bias", None) is None else module.bias + shift}
    else:
        linear: dict[str, Any] = {name: model.get_submodule(name) for name in readers}
        weights = {name: codes[name].dequantize() if name in codes else linear[name].weight for name in readers}
        biases = {name: fold(weights[name], linear[name].bias, shift) for name in readers}
    return [name for name, bias in biases.items() if set_bias(model.get_submodule(name), bias)]
