"""Checks of a calibration before a model is loaded: refusals and warnings."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_rb.quantizers.d2quant.calibrate.block import Decoder
from hf_rb.quantizers.d2quant.config import D2QuantConfig
from hf_rb.quantizers.d2quant.maths import rotation


__all__ = ["check_layers", "check_model", "warn_of_few"]

logger = logging.get_logger(__name__)


def check_model(model: PreTrainedModel, config: D2QuantConfig) -> None:
    """
    Refuses what cannot be calibrated. The weights may be on the meta device.

    Raises:
        ValueError: The model reads more than text, cannot be rotated, has no list of decoder layers or fewer positions
            than `config.seqlen`.
    """
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        reads = "an encoder's output" if model.config.is_encoder_decoder else f"`{model.main_input_name}`"
        raise ValueError(
            f"{type(model).__name__} needs {reads}, and calibration runs its layers on text alone. Use "
            "`backend='rtn'` (`--backend rtn`), which needs no calibration."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.seqlen
    if config.seqlen > positions:
        raise ValueError(
            f"`seqlen={config.seqlen}` is longer than the {positions} positions of the model: write "
            f"`seqlen={positions}` (`--seqlen {positions}`) or less."
        )
    Decoder(model)
    if config.rotate:
        rotation.check(model, config.rotation_block)


def check_layers(model: PreTrainedModel, names: Iterable[str]) -> None:
    """
    Refuses layers that calibration does not know.

    Raises:
        ValueError: Experts are fused, or a layer has another class.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                f"{name} holds fused experts, each of which sees too few of the calibration tokens for a Hessian. "
                "Use `backend='rtn'` (`--backend rtn`), or leave them as they are with "
                f"`modules_to_not_convert=[{name.split('.')[-2]!r}]` (`--skip`)."
            )
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(
                f"{name} of {type(model).__name__} is a {type(modules[name]).__name__}, and calibration knows layers "
                "of `nn.Linear` only. Use `backend='rtn'` (`--backend rtn`), which needs no calibration."
            )


def warn_of_few(tokens: int, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Warns where the calibration text has fewer tokens than the widest layer has inputs."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    widths: dict[str, int] = {name: layer.in_features for name, layer in layers.items()}
    widest = max(widths, key=widths.__getitem__)
    if tokens < widths[widest]:
        logger.warning(
            f"The calibration text has {tokens:,} tokens, fewer than the {widths[widest]:,} inputs of {widest}: its "
            "Hessian has no full rank, and the quantized weights lean on the damping. Raise `num_samples` or "
            "`seqlen`."
        )
