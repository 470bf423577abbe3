"""What the tile loop reads from a causal language model: its LM head and its last hidden states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hf_rb.ops.lm_head import Head


__all__ = ["base_of", "head_of", "last_hidden", "model_inputs"]


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the causal language model inside a PEFT model, with its adapters in place, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_of(model: torch.nn.Module) -> Head:
    """
    Returns the LM head of an unwrapped model.

    To be called inside the forward pass of its wrapper, where FSDP and DeepSpeed have the weights in place; under ZeRO-3
    inside `_compat.maybe_gather_lm_head_ctx(weight, bias)` too.
    """
    model = base_of(model)
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    weight, bias = (
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for tensor in (head.weight, getattr(head, "bias", None))
    )
    return Head(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config: Any) -> float:
    # Cohere and others, Muse Glimmer, Falcon-H1.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Returns what a model's forward pass takes of a collated batch.

    Packed and padding-free batches have `position_ids`, from which the model makes the mask that keeps their documents apart;
    an `attention_mask` beside them would replace it, so it is left out.
    """
    names = {"input_ids", "attention_mask", "position_ids"} & inputs.keys()
    if "position_ids" in names:
        names.discard("attention_mask")
        names |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"} & inputs.keys()
    return {name: inputs[name] for name in inputs if name in names}


def last_hidden(
    model: torch.nn.Module, inputs: Mapping[str, Any], router_logits: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Runs the model without its LM head.

    Args:
        model (`torch.nn.Module`):
            Unwrapped causal language model, PEFT's included.
        inputs (`Mapping`):
            Collated batch.
        router_logits (`bool`, *optional*, defaults to `False`):
            Whether to compute the load-balancing loss of a mixture of experts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Hidden states (B, L, H), and the load-balancing loss or `None`.
    """
    model, inputs = base_of(model), model_inputs(inputs)
    more = {"output_router_logits": True} if router_logits else {}
    outputs = model.base_model(**inputs, **more, use_cache=False)
    if not router_logits:
        return outputs.last_hidden_state, None
    # The loss of every family of transformers.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )
    return outputs.last_hidden_state, loss
