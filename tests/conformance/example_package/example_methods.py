"""A package of other people with an objective and a shaper, each with a flag."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_rb.advantages import Requires, SequenceShaper, Shaped, ShapingContext
from hf_rb.methods import Metric, ObjectiveMethod, ShaperMethod, flag
from hf_rb.objectives.objective import Divergence


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


@dataclass
class HalveFlags:
    halve_factor: float = flag(0.5, "Factor of the advantages of wrong completions.", range="[0, 1]")


class Halve(SequenceShaper):
    method = ShaperMethod(
        key="halve",
        name="Halve",
        summary="Halves the advantages of wrong completions.",
        flags=HalveFlags,
        metrics=(Metric("wrong", "number of wrong completions", "[0, inf)"),),
    )
    requires = Requires(correct=True)

    def __init__(self, factor: float = HalveFlags.halve_factor):
        self.factor = factor

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "Halve":
        return cls(args.halve_factor)

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped:
        halved = torch.where(ctx.correct, advantages, advantages * self.factor)
        return Shaped(halved, {"wrong": float((~ctx.correct).sum())})
