"""Model interpolation (https://huggingface.co/papers/2510.10977): every weight between two models, on a straight line.

    W(lambda) = lambda W_end + (1 - lambda) W_start

With an Instruct model as the start and a Thinking model as the end, a larger lambda thinks longer and more often. It
is task arithmetic with the weights 1 - lambda and lambda whatever the base, which cancels, and WiSE-FT if start and
end are a model before and after its fine-tuning.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rb.methods import MergeMethod, Paper, flag
from hf_rb.weights.adapters import combine_adapters
from hf_rb.weights.merging import documented_merge, merge_models
from hf_rb.weights.operation import Job, Operation, Piece, Request, measure, pieces
from hf_rb.weights.options import Extrapolating, Lambdas, Model, check_lambdas, lambda_flag
from hf_rb.weights.patterns import matcher, select
from hf_rb.weights.report import MergeReport


__all__ = ["Interpolation", "interpolate", "interpolate_tensors"]


def interpolate_tensors(start: Tensor, end: Tensor, lam: float) -> Tensor:
    """
    Returns `lam * end + (1 - lam) * start`, and exactly `start` at 0, exactly `end` at 1 and wherever the two are
    equal.

    Args:
        start, end (`torch.Tensor` of one shape):
            Values for lambda 0 and 1, in float32 or float64 for arithmetic without further rounding.
        lam (`float`):
            Lambda. Outside [0, 1] it extrapolates.
    """
    if lam in (0, 1):  # `lerp` turns -0.0 into 0.0
        return end if lam else start
    return torch.where(start == end, start, torch.lerp(start, end, lam))


@dataclass
class InterpolationFlags(Extrapolating):
    lam: Lambdas = lambda_flag(0.5, "Place between the two models")
    rules: dict[str, float] = flag(
        {},
        "Another lambda for some tensors, by pattern, as layers:0-11=0.8 or attn=0; the first that fits holds.",
    )
    rank: int | None = flag(None, "Of adapters: rank of the result. By default both are in it, which is exact.")


class Interpolation(Operation):
    """The equation above, with a lambda of its own for the tensors that a rule names."""

    method = MergeMethod(
        key="interpolation",
        command="linear",
        name="Model interpolation",
        paper=Paper(
            "2510.10977",
            "Revisiting Model Interpolation for Efficient Reasoning",
            "Taiqiang Wu, Runming Yang, Tao Liu, Jiahao Wang, Ngai Wong",
        ),
        summary="Every weight on the straight line between two models, such as an Instruct and a Thinking model, "
        "whose place on it sets how long the result thinks.",
        models={
            "start": "the model, or LoRA adapter, at lambda 0",
            "end": "the model, or LoRA adapter, at lambda 1",
        },
        adapters=("start", "end"),
        for_adapters=("rank",),
        files_from=("start", "end"),
        include="all",
        flags=InterpolationFlags,
    )
    silent = ("rank",)

    def __init__(self, **flags: Any):
        super().__init__(**flags)
        self.flags.rules = dict(self.flags.rules or {})
        for value in self.flags.rules.values():
            check_lambdas(value, extrapolate=self.flags.extrapolate)
        self.matchers = [(matcher(pattern), lam) for pattern, lam in self.flags.rules.items()]

    def of_adapters(self, request: Request) -> MergeReport:
        names = list(request.models.values())
        if len(request.adapters) < 2:
            raise ValueError(
                f"Of {names[0]} and {names[1]} one is an adapter and one a model. Merge the adapter into its model "
                "first."
            )
        self.check_whole(request)
        (lam,), overwrite = self.lams, request.options.overwrite
        return combine_adapters(names, [1 - lam, lam], request.destination, rank=self.flags.rank, overwrite=overwrite)

    def check(self, names: Iterable[str]) -> None:
        for pattern in self.flags.rules:
            select(pattern, names)

    def pieces(self, job: Job) -> Iterator[Piece]:
        rule = next((lam for match, lam in self.matchers if match(job.name)), None)
        lams = self.lams if rule is None else (rule,) * len(self.lams)
        for start, end in pieces(job.entry, job.others["end"]):
            results = [interpolate_tensors(start, end, lam).to(job.dtype) for lam in lams]
            yield Piece(results, measure(start, results, compared=(start, end)))


@documented_merge(Interpolation)
def interpolate(
    start: Model, end: Model, destination: Model, lam: Lambdas = InterpolationFlags.lam, **options: Any
) -> MergeReport:
    """
    Writes models between two models, with the memory of a few pieces of a tensor: in float32, rounded once. Two LoRA
    adapters give an adapter (see [`combine_adapters`]).
    """
    return merge_models(Interpolation, {"start": start, "end": end}, destination, lam=lam, **options)
