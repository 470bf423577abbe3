"""Parallelism that cuts sequences over processes."""

from hf_rb.trainers.common.below import TrainerBelow


__all__ = ["cuts_sequences"]


def cuts_sequences(trainer: TrainerBelow) -> bool:
    """Returns whether context or sequence parallelism is on, where a process holds a part of every sequence."""
    parallelism = trainer.accelerator.parallelism_config
    return parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
