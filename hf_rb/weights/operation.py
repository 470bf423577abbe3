"""Operation on one tensor of a merge. A method is a subclass of [`Operation`], which [`~hf_rb.weights.engine.merge`]
runs.

An operation that averages two models, as a worked example:

```python
class Average(Operation):
    method = "interpolation"  # key in `hf_rb.hub.METHODS`: what the card says, and its paper
    # roles: the user says which model gives configuration and tokenizer, where they differ
    files_from = ("one", "other")

    def pieces(self, job):
        other = job.others["other"]  # the receiving model's tensor is `job.entry`
        for ours, theirs in pieces(job.entry, other):  # flat, float32, at most ELEMENTS values each
            results = [(0.5 * (ours + theirs)).to(job.dtype)]  # one result, as there is no sweep
            yield Piece(results, measure(ours, ours, theirs, results))


report = merge(Average(), [Source("one", "a"), Source("other", "b")], "average", Options(include="linear"))
```

The first source receives: its tensors, names, shapes and files are those of the result. The engine calls `pieces` for
every tensor that `include` selects and that both models have, writes the results in the order in which they come, adds
up their `sums` and takes the root. An operation that makes several results at a time sets `sweep` to their lambdas and
yields as many results in each piece. One that yields several rows of the report for a tensor, for instance one for
each expert of a stack, ends each with `Piece.row`. `keeps` copies tensors that the method cannot treat, `dtype` widens
the result, and `options` and `notes` go into the report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.safetensors import Entry
from hf_rb.utils.dtypes import WEIGHT_TYPES
from hf_rb.weights.report import TensorReport


__all__ = [
    "ELEMENTS",
    "Job",
    "Operation",
    "Options",
    "Piece",
    "check_finite",
    "check_lambdas",
    "measure",
    "pieces",
    "square",
]

ELEMENTS = 1 << 18  # of a piece: small enough for a processor's cache


@dataclass(frozen=True)
class Job:
    """A tensor of the result: the receiving model's `entry`, those of the other models by role, and its type.

    `kept` says why it is copied; then there are no others.
    """

    name: str
    entry: Entry
    others: Mapping[str, Entry]
    dtype: torch.dtype
    kept: str | None = None


@dataclass(frozen=True)
class Piece:
    """A flat piece of each result, rounded to the job's type, with what was measured on it.

    `sums` are added up over the pieces of a tensor. `row` ends a row of the report: the name it gets, behind the
    tensor's, and values that are no sums.
    """

    results: Sequence[Tensor]
    sums: Mapping[str, Any]
    row: tuple[str, dict[str, Any]] | None = None


class Operation:
    """
    Operation on one tensor. A method is a subclass.

    Attributes:
        method (`str`): Key in `hf_rb.hub.METHODS`.
        files_from (`tuple[str, ...]`): Roles of the models whose configuration, tokenizer and so on the result may
            get.
        sweep (`tuple[float, ...]`, *optional*): The lambdas of several results; `None` for one result.
    """

    method: str
    files_from: tuple[str, ...]
    sweep: tuple[float, ...] | None = None

    def keeps(self, name: str, entry: Entry) -> str | None:
        """Returns the reason for which a tensor that the user has included is copied nevertheless."""
        return None

    def dtype(self, entry: Entry, others: Mapping[str, Entry]) -> torch.dtype:
        """Type of the result."""
        return entry.dtype

    def pieces(self, job: Job) -> Iterator[Piece]:
        """Yields the tensor's pieces in order."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Returns the options that were asked for, for the report."""
        return {}

    def notes(self, rows: list[TensorReport]) -> list[str]:
        """Returns notes on the result for a user."""
        return []


@dataclass(frozen=True)
class Options:
    """Options of all operations; see [`~hf_rb.weights.interpolate`]."""

    include: str
    mismatch: str = "refuse"
    files_from: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    resume: bool = True
    progress: bool = True

    def __post_init__(self):
        if self.mismatch not in ("refuse", "skip"):
            raise ValueError(f"`mismatch` cannot be {self.mismatch!r}; write 'refuse' or 'skip'.")
        if self.dtype not in (None, *WEIGHT_TYPES):
            raise ValueError(
                f"`dtype` cannot be {self.dtype!r}; write 'float32', 'bfloat16' or 'float16', or leave it out."
            )


def check_lambdas(lam: float | Sequence[float], extrapolate: bool) -> tuple[float, ...]:
    """Returns the lambdas as a tuple.

    Raises:
        ValueError: There is none, two are equal, or one is outside [0, 1] and `extrapolate` is `False`.
    """
    lams = (lam,) if isinstance(lam, int | float) else tuple(lam)
    if not lams or len({f"{value:g}" for value in lams}) < len(lams):
        raise ValueError(f"`lam` is {lam!r}: give one value, or several different ones for a sweep.")
    for value in lams:
        if not float("-inf") < value < float("inf"):
            raise ValueError(f"lambda is {value}; write a number in [0, 1].")
        if not (extrapolate or 0 <= value <= 1):
            raise ValueError(
                f"lambda is {value}, which is outside [0, 1] and extrapolates. Write a value in [0, 1], or say that "
                "it is meant with `extrapolate=True` (`--extrapolate`)."
            )
    return lams


def pieces(*entries: Entry) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same flat piece of several tensors in float32 (float64 stays), after having looked for NaN and
    infinity.
    """
    dtype = torch.float64 if any(entry.dtype == torch.float64 for entry in entries) else torch.float32
    for parts in zip(*(entry.chunks(dtype, ELEMENTS) for entry in entries), strict=True):
        for entry, part in zip(entries, parts, strict=True):
            check_finite(part, str(entry.file))
        yield parts


def check_finite(values: Tensor, where: str) -> None:
    # A sum of squares is not finite if any value is not: one fast pass, and a second one only if it overflowed.
    if not torch.dot(values.view(-1), values.view(-1)).isfinite() and not values.isfinite().all():
        raise ValueError(
            f"{where} holds NaN or infinity. Look for the step that made it; such a model computes nothing."
        )


def measure(receiving: Tensor, one: Tensor, other: Tensor, results: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the sums behind the norms of [`MergeReport`], `one` and `other` being the models that are compared."""
    difference = one - other
    changes = [square(result.to(receiving.dtype).view(-1) - receiving) for result in results]
    if not all(map(isfinite, changes)):
        raise ValueError(
            f'the result is too large for {results[0].dtype}. Write `dtype="float32"` (`--dtype float32`).'
        )
    return {
        "norm": square(receiving),
        "difference": square(difference),
        "change": torch.tensor(changes, dtype=torch.float64),
        "sigma": difference.abs().sum().item(),
        "absolute": (one.abs().sum() + other.abs().sum()).item(),
    }


def square(values: Tensor) -> float:
    return torch.dot(values.view(-1), values.view(-1)).item()
