"""A causal language model in two parts: the backbone, which makes the last hidden states, and the LM head as the tile
loop takes it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_rb.ops.lm_head import Head
from hf_rb.utils import compat


__all__ = [
    "backbone_output",
    "evaluating",
    "gathered_head",
    "has_prompt_learning",
    "head_of",
    "model_inputs",
    "name_of",
    "own_randomness",
    "recorded_hidden",
    "undisturbed",
    "width_of",
    "without_peft",
]

# What a collated text batch may hold for the model; labels and the columns of a dataset are not among it.
_MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
)


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Returns what a model's forward takes of a collated batch.

    Beside `position_ids` there is never an `attention_mask`: models separate the sequences of a packed row by their
    positions only where no mask is given.
    """
    chosen = {key: inputs[key] for key in _MODEL_INPUTS if inputs.get(key) is not None}
    if "position_ids" in chosen:
        chosen.pop("attention_mask", None)
    return chosen


def backbone_output(model: PreTrainedModel, inputs: Mapping[str, Any], **kwargs: Any) -> ModelOutput:
    """
    Runs everything of a causal language model but its LM head.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped model. Under FSDP or DeepSpeed, call this inside the wrapper's forward.
        inputs (`Mapping`):
            Collated batch.
        **kwargs:
            More arguments of the forward, such as `output_router_logits=True`.

    Returns:
        [`~transformers.utils.ModelOutput`]: With `last_hidden_state` of shape `(B, L, H)`.
    """
    return without_peft(model).base_model(**model_inputs(inputs), use_cache=False, **kwargs)


@contextmanager
def recorded_hidden(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """
    Context in which the last hidden states `(B, L, H)` of every forward pass of a causal language model are appended
    to a list, with their gradient: for a loss on what someone else's forward pass has computed anyway.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped model.

    Raises:
        ValueError: A forward pass gives no last hidden states.
    """
    states: list[torch.Tensor] = []
    backbone = without_peft(model).base_model

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is None:
            raise ValueError(
                f"The backbone of {name_of(model)}, a {type(module).__name__}, returns no "
                "`last_hidden_state`, which Hidden-Align reads. Train without `hidden_align_coef`, or another model."
            )
        states.append(output.last_hidden_state)

    handle = backbone.register_forward_hook(record)
    try:
        yield states
    finally:
        handle.remove()


def head_of(model: PreTrainedModel) -> Head:
    """
    Returns a model's LM head with what the model does to its logits.

    A head that FSDP2 has sharded comes gathered, differentiably; under ZeRO-3, call this inside [`gathered_head`].
    """
    layer: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    return Head(
        weight=_full(layer.weight),
        bias=_full(getattr(layer, "bias", None)),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def gathered_head(model: PreTrainedModel) -> AbstractContextManager:
    """Context in which ZeRO-3 holds the whole LM head on every process. Does nothing without ZeRO-3."""
    layer: Any = model.get_output_embeddings()
    bias: Any = getattr(layer, "bias", None)
    return compat.maybe_gather_lm_head_ctx(layer.weight, bias)


def width_of(model: PreTrainedModel) -> int:
    """Returns the number of logits of a model, padding included."""
    return model.config.get_text_config().vocab_size


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode and every module back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def own_randomness(devices: Iterable[torch.device]) -> AbstractContextManager:
    """Context after which the random states of the CPU and of devices are as before. MPS cannot tell its state, and
    does not keep it.
    """
    devices = [device for device in devices if device.type not in ("cpu", "meta", "mps")]
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cpu")


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """
    Context for forward passes that leave no trace: in evaluation mode and without gradient, after which random states,
    modes and buffers are as before, and so are the attributes of modules that keep buffers out of their state, such as
    the length that dynamic rotary positions have seen. Buffers of more than 65,536 numbers, which are tables or packed
    weights and no counters, are not kept.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules() if module._non_persistent_buffers_set]
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.numel() <= 65_536
    ]
    with own_randomness({parameter.device for parameter in model.parameters()}), evaluating(model), torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            for module, before in attributes:
                vars(module).update(
                    (name, value) for name, value in before.items() if not isinstance(value, dict | set)
                )


def without_peft(model: Any) -> PreTrainedModel:
    """Returns the transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def has_prompt_learning(model: PreTrainedModel) -> bool:
    """Returns whether a model has an adapter of virtual tokens, such as prompt tuning."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def name_of(model: PreTrainedModel) -> str:
    """Returns the name of a model's class in transformers."""
    kinds = type(without_peft(model)).__mro__
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule)).__name__


def _full(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling  # Granite and MiniCPM3 divide
