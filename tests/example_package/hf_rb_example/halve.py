"""Halve: advantages of wrong completions times a factor, as an advantage shaper with a flag."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_rb.advantages import Requires, SequenceShaper, Shaped, ShapingContext
from hf_rb.methods import Metric, ShaperMethod, flag


__all__ = ["Halve", "HalveFlags"]


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
