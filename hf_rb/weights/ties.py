"""TIES-Merging (https://huggingface.co/papers/2306.01708): several models that were tuned from one base, without what
each of them has least learned and where they disagree.

    tau_i = W_i - W_base
    trim        keep the density share of tau_i with the largest magnitudes, 0 elsewhere
    elect       gamma = sgn(sum_i tau_i), of every weight; +1 where the sum is 0
    merge       tau = mean of the tau_i that are not 0 and have the sign gamma, 0 without one
    W = W_base + lambda tau

The paper trims the whole of tau_i at once; here, as in mergekit, each tensor keeps its own floor(density * size)
largest, at least one. Among equal magnitudes the first ones are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rb.methods import MergeMethod, Metric, Paper, flag
from hf_rb.weights.operation import Job, Operation, Piece, measure, pieces
from hf_rb.weights.options import Lambdas, lambda_flag


__all__ = ["Ties", "Trim", "disjoint_mean", "ties_tensors"]

BITS = 1 << 16


class Trim:
    """
    Keeps the largest values of a vector that comes piece by piece, several times, and never as a whole.

    Magnitudes are compared in float32. Their bits are in the order of their values, so that two counts of 2^16 bins,
    of the upper and of the lower half of the bits, find the smallest one to keep.

    Args:
        vector (`Callable[[], Iterable[torch.Tensor]]`):
            Yields the pieces, flat.
        count (`int`):
            Values to keep.
    """

    def __init__(self, vector: Callable[[], Iterable[Tensor]], count: int):
        self.bound = 0
        for shift in (16, 0):
            bins = torch.zeros(BITS, dtype=torch.long)
            for piece in vector():
                bits = self._bits(piece)
                inside = bits if shift else bits[bits >> 16 == self.bound]
                bins += torch.bincount((inside >> shift) % BITS, minlength=BITS)
            above = bins.sum() - bins.cumsum(0)  # values in higher bins
            chosen = int((above < count).nonzero()[0])
            self.bound, count = self.bound * BITS + chosen, count - int(above[chosen])
        self.left = count  # of those that have exactly the magnitude of the bound

    @staticmethod
    def _bits(values: Tensor) -> Tensor:
        return values.abs().float().view(torch.int32).long()

    def __call__(self, piece: Tensor) -> Tensor:
        """Returns the next piece, with 0 for what is not kept."""
        bits = self._bits(piece)
        equal = bits == self.bound
        kept = (bits > self.bound) | (equal & (equal.cumsum(0) <= self.left))
        self.left -= int(equal.sum())
        return torch.where(kept, piece, 0)


def disjoint_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Returns the mean of those values, of several trimmed tensors of one shape, that have the elected sign."""
    stacked = torch.stack([*deltas])
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agreeing = stacked.sign() == elected
    return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def ties_tensors(base: Tensor, tuned: Sequence[Tensor], density: float, lam: float) -> Tensor:
    """
    Merges tuned tensors into that of their base.

    Args:
        base (`torch.Tensor`), tuned (`Sequence[torch.Tensor]`):
            Tensors of one shape, in float32 or float64.
        density (`float`):
            Share of every difference from Base that is kept, in (0, 1].
        lam (`float`):
            Factor of the merged difference.
    """
    deltas = [(one - base).view(-1) for one in tuned]
    trimmed = [Trim(lambda delta=delta: [delta], kept_count(density, base.numel()))(delta) for delta in deltas]
    return base + lam * disjoint_mean(trimmed).view(base.shape)


def kept_count(density: float, size: int) -> int:
    """Returns how many values of a tensor of that size are kept."""
    return max(1, int(density * size))


@dataclass
class TiesFlags:
    lam: Lambdas = lambda_flag(1.0, "Factor of the merged difference from Base", "[0, inf)")
    density: float = flag(0.2, "Share of the difference from Base that each tensor keeps.", range="(0, 1]")


class Ties(Operation):
    """The equations above. The files are read three times, first for what is trimmed."""

    method = MergeMethod(
        key="ties",
        name="TIES-Merging",
        paper=Paper(
            "2306.01708",
            "TIES-Merging: Resolving Interference When Merging Models",
            "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
        ),
        summary="Adds to a base what several models tuned from it have most learned, where they agree on its sign.",
        models={"base": "the model that all were tuned from", "tuned": "a model tuned from it"},
        several=("tuned",),
        files_from=("base", "tuned"),
        include="all",
        flags=TiesFlags,
        metrics=(Metric("agreeing", "share of the kept values that have the elected sign, mean", "[0, 1]", "higher"),),
    )

    def pieces(self, job: Job) -> Iterator[Piece]:
        count = kept_count(self.flags.density, torch.Size(job.entry.shape).numel())
        trims = [
            Trim(lambda entry=entry: (tuned - base for base, tuned in pieces(job.entry, entry)), count)
            for entry in job.others.values()
        ]
        kept = agreeing = 0
        for base, *tuned in pieces(job.entry, *job.others.values()):
            deltas = [trim(one - base) for trim, one in zip(trims, tuned, strict=True)]
            mean = disjoint_mean(deltas)
            results = [torch.where(mean == 0, base, base + lam * mean).to(job.dtype) for lam in self.lams]
            kept += sum(int(delta.count_nonzero()) for delta in deltas)
            agreeing += sum(int((delta.sign() * mean.sign() > 0).sum()) for delta in deltas)
            yield Piece(results, measure(base, results), {"agreeing": agreeing / kept if kept else 1.0})
