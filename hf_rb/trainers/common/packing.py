"""The check that a run makes of its first packed batch: models that let packed sequences see each other are
refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel

from hf_rb.ops.backbone import has_prompt_learning
from hf_rb.ops.packing import Leak, LeakingPacking, is_packed, leak_message, measure_leak
from hf_rb.ops.processes import on_any_process
from hf_rb.trainers.common.below import TrainerBelow
from hf_rb.trainers.common.parallelism import cuts_sequences
from hf_rb.utils import compat


__all__ = ["check_packing"]


@torch.no_grad()
def check_packing(trainer: TrainerBelow, model: torch.nn.Module, inputs: Mapping[str, Any], **kwargs: Any) -> None:
    """
    Compares a sequence of a run's first packed batch with itself alone, in every model that reads the batch.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer; its config has `allow_leaking_packing`.
        model (`torch.nn.Module`):
            Wrapped model.
        inputs (`Mapping`):
            Collated batch on the device. All processes call this with each of their batches. Packed ones have
            `position_ids`, and so does a batch of padding-free rows; others return at once.
        **kwargs:
            More arguments of the backbone's forward.

    Raises:
        ValueError: A model lets the sequences see each other, on any process, or has a prompt-learning adapter.
    """
    args: Any = trainer.args  # of `PackingArguments`
    if "position_ids" not in inputs or args.allow_leaking_packing:
        return
    if getattr(trainer, "_packing_is_checked", False):
        return
    if cuts_sequences(trainer) or not on_any_process(is_packed(inputs)):
        return
    device = inputs["input_ids"].device
    unwrapped: Any = trainer.accelerator.unwrap_model(model)
    if has_prompt_learning(unwrapped):  # of which no hidden states of the model alone tell
        raise LeakingPacking(
            "Prompt-learning adapters do not keep the sequences of a packed row apart: PEFT drops their "
            "`position_ids`. Set `packing: false` and `padding_free: false`, or use LoRA; `allow_leaking_packing: "
            "true` trains all the same, as TRL does."
        )
    with trainer.accelerator.autocast():
        # Inside the forward of the wrapper, where FSDP and DeepSpeed have the weights in place.
        redirect = compat.ForwardRedirection()
        _refuse(unwrapped, redirect(model, unwrapped, measure_leak, unwrapped, inputs, **kwargs), device)
        sources: list[Any] = [getattr(trainer, name, None) for name in ("teacher", "reference")]
        for source in sources:
            if hasattr(source, "measure_leak"):  # not a cache, nor the student without its adapters
                _refuse(source.model, source.measure_leak(inputs), device)
    trainer._packing_is_checked = True


def _refuse(model: PreTrainedModel, leak: Leak, device: torch.device) -> None:
    """Raises on all processes if one of them has seen a leak."""
    difference, ratio = max(gather(torch.tensor([[*leak]], device=device)).tolist(), key=lambda one: one[1])
    if ratio > 1:
        raise LeakingPacking(leak_message(model, Leak(difference, ratio)))
