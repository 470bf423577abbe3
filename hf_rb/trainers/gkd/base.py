"""TRL's GKD trainer without its set-up, which ours replaces."""

from typing import Any

import torch
import trl

from hf_rb.utils import compat


__all__ = ["GKDBase"]


class GKDBase(compat.GKDTrainer):
    """
    TRL's `GKDTrainer`, constructed and stepped as its parent, so that `super()` reaches every class between ours and it.

    Its own constructor would replace the preparation of the data and attach a teacher of the student's exact width. Its own step
    samples after the labels are counted.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        trl.SFTTrainer.__init__(self, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return trl.SFTTrainer.training_step(self, *args, **kwargs)
