"""The check that a run makes of TRL's fused LM head: whether the log-probabilities that TRL trains on are the model's
own.
"""

import logging
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from hf_rb.ops.backbone import name_of, without_peft
from hf_rb.ops.logit_source import agreed_reason
from hf_rb.trainers.common.below import TrainerBelow
from hf_rb.trainers.common.parallelism import cuts_sequences
from hf_rb.utils import compat


__all__ = ["check_fused_head", "why_not_fused"]

logger = logging.getLogger(__name__)


def why_not_fused(trainer: TrainerBelow, model: torch.nn.Module) -> str | None:
    """
    Returns why the logits of a wrapped model are not what TRL takes them for, last hidden states times LM head; `None`
    if they are.

    Costs one forward pass of 8 tokens. All processes call this together, and all get a reason if one of them has one.
    """
    unwrapped: Any = trainer.accelerator.unwrap_model(model)
    with trainer.accelerator.autocast():
        # Inside the forward of the wrapper, where FSDP and DeepSpeed have the weights in place. DeepSpeed takes no
        # text as an output.
        return compat.ForwardRedirection()(model, unwrapped, lambda: (agreed_reason(without_peft(unwrapped)),))[0]


def check_fused_head(trainer: TrainerBelow, model: torch.nn.Module, remedy: str) -> None:
    """
    Warns once a run where TRL trains a model on other log-probabilities than the model's own. Changes no number.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        model (`torch.nn.Module`):
            Wrapped model.
        remedy (`str`):
            Sentence that says what to write instead.
    """
    if getattr(trainer, "_fused_head_is_checked", False):
        return
    trainer._fused_head_is_checked = True
    if cuts_sequences(trainer):
        return  # also the 8 tokens that each process would compare
    reason, unwrapped = why_not_fused(trainer, model), cast(PreTrainedModel, trainer.accelerator.unwrap_model(model))
    if reason and trainer.accelerator.is_main_process:
        logger.warning(
            f"TRL's loss takes the logits of {name_of(unwrapped)} to be its last "
            "hidden states times its LM head, with a scale and a cap that TRL knows. They are not, or it could not "
            f"be told: {reason}. The run goes on as TRL's does, perhaps on other probabilities than the model's own. "
            f"{remedy}"
        )
