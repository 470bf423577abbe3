"""Logits in float32 of models in half precision, by the models' own forward passes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


__all__ = ["wide_heads"]


@contextmanager
def wide_heads(*models: PreTrainedModel) -> Iterator[None]:
    """
    Context in which LM heads multiply in float32, as the tile loop does ([`~hf_rb.ops.lm_head.lm_head_loss`]).

    In bfloat16 a logit of 20 is rounded to a multiple of 1/8, which a log-probability does not survive. Heads that are
    no plain `nn.Linear` are left as they are.

    Args:
        *models ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Unwrapped models.
    """
    with ExitStack() as stack:
        for layer in {model.get_output_embeddings() for model in models}:
            if type(layer) is nn.Linear:
                stack.enter_context(_wide(layer))
        yield


@contextmanager
def _wide(layer: nn.Linear) -> Iterator[None]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return linear(hidden.float(), layer.weight.float(), bias)

    # The hook of a device map brings the weight, and then calls what it has put aside.
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    replaced = layer.__dict__.get(name)
    setattr(layer, name, forward)
    try:
        yield
    finally:
        delattr(layer, name)
        if replaced is not None:
            setattr(layer, name, replaced)
