"""Source of a model's logits for the tile loop: last hidden states and LM head where the model multiplies just these,
else its own logits.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_rb.ops.backbone import backbone_output, gathered_head, head_of, model_inputs, name_of, width_of
from hf_rb.ops.head_check import why_not_head
from hf_rb.ops.lm_head import Head
from hf_rb.ops.processes import on_any_process
from hf_rb.ops.wide_head import wide_heads


__all__ = ["LogitSource", "agreed_reason"]

logger = logging.getLogger(__name__)


class LogitSource:
    """
    Gives the tile loop the logits of one model.

    The first use compares the model's own logits with those of [`~hf_rb.ops.lm_head.Head`] on 8 tokens
    ([`~hf_rb.ops.head_check.why_not_head`]). Where they are the same, the loop multiplies hidden states by the head.
    Where they are not, or cannot be compared, the model's own logits stand in for hidden states, and one warning says
    so: the result is the same as with `loss_impl: dense`, for the memory of all logits.

    Under DDP, FSDP or DeepSpeed, call everything here inside the wrapper's forward, on all processes: they agree on
    the outcome.

    Attributes:
        outcome (`bool`, *optional*): What the comparison has found, `None` before it.
    """

    def __init__(self) -> None:
        self.outcome: bool | None = None

    def is_head(self, model: PreTrainedModel) -> bool:
        """Returns whether a model's logits are its last hidden states through its LM head; compares them in the first
        call.
        """
        if self.outcome is None:
            reason = agreed_reason(model)
            self.outcome = reason is None
            if reason and PartialState().is_main_process:
                logger.warning(_notice(model, reason))
        return self.outcome

    def output(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], **kwargs: Any
    ) -> tuple[torch.Tensor, ModelOutput]:
        """
        Runs a model as far as the loop needs it.

        Args:
            model ([`~transformers.PreTrainedModel`] or `PeftModel`):
                Unwrapped model.
            inputs (`Mapping`):
                Collated batch.
            **kwargs:
                More arguments of the forward, such as `output_router_logits=True`.

        Returns:
            `tuple[torch.Tensor, ModelOutput]`: What the loop takes as hidden states, of shape `(B, L, H)`, or
            `(B, L, V)` where they are the model's own logits; and all that the model returned.

        Raises:
            ValueError: The model's own logits are needed, and it gives none over its vocabulary.
        """
        if self.is_head(model):
            output: Any = backbone_output(model, inputs, **kwargs)
            return output.last_hidden_state, output
        # Not by calling the model: inside the forward of its wrapper, that would run the wrapper's hooks once more.
        with wide_heads(model):
            output = model.forward(**model_inputs(inputs), use_cache=False, **kwargs)
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape != (*inputs["input_ids"].shape, width_of(model)):
            given = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ValueError(
                f"{name_of(model)} gives {given} for input ids of shape {tuple(inputs['input_ids'].shape)} and a "
                f"vocabulary of {width_of(model):,}, so that no distribution of the next token can be read from it. "
                "Use a causal language model as student, teacher or reference."
            )
        return logits, output

    @contextmanager
    def head(self, model: PreTrainedModel) -> Iterator[Head]:
        """Context with the LM head that goes with [`output`]; under ZeRO-3, it is whole inside only."""
        if not self.is_head(model):
            yield Head(weight=None)
            return
        with gathered_head(model):
            yield head_of(model)


def agreed_reason(model: PreTrainedModel) -> str | None:
    """[`~hf_rb.ops.head_check.why_not_head`] of all processes: a reason on any of them is one on each."""
    reason = why_not_head(model)
    return (reason or "so it is on another process") if on_any_process(reason is not None) else None


def _notice(model: PreTrainedModel, reason: str) -> str:
    return (
        f"The logits of {name_of(model)} are not its last hidden states times its LM head, with a scale and a cap "
        f"that are known, or it could not be told: {reason}. So its own logits are taken, of all tokens of a batch "
        "at once, as with `loss_impl: dense`: the loss is right and takes more memory. Where it does not fit, lower "
        "`per_device_train_batch_size`."
    )
