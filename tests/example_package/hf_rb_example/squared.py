"""Squared: the squared difference of probabilities, as a distillation objective with two flags."""

from dataclasses import dataclass

import torch

from hf_rb.methods import ObjectiveMethod, flag
from hf_rb.objectives.objective import Divergence


__all__ = ["Squared", "SquaredFlags"]


@dataclass
class SquaredFlags:
    squared_scale: float = flag(100.0, "Factor.", range="(0, inf)")
    squared_kind: str = flag("plain", "Whether the factor counts once (`plain`) or twice.", choices=["plain", "twice"])


class Squared(Divergence):
    method = ObjectiveMethod(
        key="squared", name="Squared", summary="Squared difference of probabilities.", flags=SquaredFlags, mixes=True
    )
    flags: SquaredFlags

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        factor = self.flags.squared_scale * (2 if self.flags.squared_kind == "twice" else 1)
        return factor * (student_logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).square().sum(-1)
