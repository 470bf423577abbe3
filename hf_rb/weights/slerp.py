"""SLERP: every tensor on the arc between those of two models, instead of the straight line (Shoemake, "Animating
rotation with quaternion curves", SIGGRAPH 1985).

    W(lambda) = sin((1 - lambda) theta) / sin(theta) W_start + sin(lambda theta) / sin(theta) W_end
    cos(theta) = <W_start, W_end> / (|W_start| |W_end|)

with each tensor as one flat vector, and the tensors themselves, not their directions, in the first line: the same
convention as mergekit's `slerp`. Between two tensors of one norm the norm stays on the way, which the straight line
shortens; of two norms, both direction and norm are interpolated. Where theta is less than 1e-4, or as close to pi, the
line is taken; mergekit takes it from |cos(theta)| = 0.9995 on, an angle of 0.03.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import acos, pi, sin, sqrt

import torch
from torch import Tensor

from hf_rb.methods import MergeMethod, Metric
from hf_rb.weights.interpolation import interpolate_tensors
from hf_rb.weights.operation import Job, Operation, Piece, measure, pieces
from hf_rb.weights.options import Lambdas, lambda_flag


__all__ = ["Slerp", "angle_between", "slerp_tensors"]

STRAIGHT = 1e-4  # radians


def angle_between(parts: Iterator[tuple[Tensor, ...]] | Sequence[tuple[Tensor, Tensor]]) -> float:
    """Returns the angle between two vectors that come piece by piece, in [0, pi]; 0 if one of them is zero."""
    dot = norms = torch.zeros((), dtype=torch.float64)
    for start, end in parts:
        one, other = start.double().view(-1), end.double().view(-1)
        dot = dot + one @ other
        norms = norms + torch.stack([one @ one, other @ other])
    scale = sqrt(norms.prod().item()) if norms.ndim else 0.0
    return acos(max(-1.0, min(1.0, dot.item() / scale))) if scale else 0.0


def slerp_tensors(start: Tensor, end: Tensor, lam: float, angle: float | None = None) -> Tensor:
    """
    Returns what lies at `lam` on the arc from `start` to `end`: exactly `start` at 0, exactly `end` at 1.

    Args:
        start, end (`torch.Tensor` of one shape):
            Values for lambda 0 and 1, in float32 or float64; or a part of them.
        lam (`float`):
            Lambda in [0, 1].
        angle (`float`, *optional*):
            Angle between the two, in radians. Defaults to that of these tensors.
    """
    angle = angle_between([(start, end)]) if angle is None else angle
    if lam in (0, 1) or min(angle, pi - angle) < STRAIGHT:
        return interpolate_tensors(start, end, lam)
    return sin((1 - lam) * angle) / sin(angle) * start + sin(lam * angle) / sin(angle) * end


@dataclass
class SlerpFlags:
    lam: Lambdas = lambda_flag(0.5, "Place on the arc between the two models")


class Slerp(Operation):
    """The equation above. The files are read twice, first for the angles."""

    method = MergeMethod(
        key="slerp",
        name="SLERP",
        summary="Every tensor, as one vector, on the arc between those of two models.",
        models={"start": "the model at lambda 0", "end": "the model at lambda 1"},
        files_from=("start", "end"),
        include="all",
        flags=SlerpFlags,
        metrics=(Metric("angle", "angle between the tensors of the two models, in radians, mean", "[0, 3.1416]"),),
    )

    def pieces(self, job: Job) -> Iterator[Piece]:
        angle = angle_between(pieces(job.entry, job.others["end"]))
        for start, end in pieces(job.entry, job.others["end"]):
            results = [slerp_tensors(start, end, lam, angle).to(job.dtype) for lam in self.lams]
            yield Piece(results, measure(start, results, compared=(start, end)), {"angle": angle})
