"""Operation on one tensor of a merge. A method is a subclass of [`Operation`] with a record, which
[`~hf_rb.weights.merge_models`] and `hf-rb merge` run.

A merge that averages two models, as a worked example. Another package registers it in the entry-point group
`hf_rb.merges`, as `average = "its.module:Average"`:

```python
from dataclasses import dataclass

from hf_rb.methods import MergeMethod, flag
from hf_rb.weights import merge_models
from hf_rb.weights.operation import Operation, Piece, measure, pieces


@dataclass
class AverageFlags:
    share: float = flag(0.5, "Share of the other model.", range="[0, 1]")


class Average(Operation):
    method = MergeMethod(
        key="average",
        name="Average",
        summary="The mean of two models.",
        models={"one": "a model", "other": "another one"},  # `--one MODEL --other MODEL`; the first one receives
        files_from=("one", "other"),  # the user says which gives configuration and tokenizer, where they differ
        flags=AverageFlags,  # `--share X`
    )

    def pieces(self, job):
        share, other = self.flags.share, job.others["other"]  # the receiving model's tensor is `job.entry`
        for ours, theirs in pieces(job.entry, other):  # flat, float32, at most ELEMENTS values each
            results = [((1 - share) * ours + share * theirs).to(job.dtype)]  # one result, as there is no sweep
            yield Piece(results, measure(ours, results, compared=(ours, theirs)))


report = merge_models(Average, {"one": "a", "other": "b"}, "average", share=0.5)
```

The result has the tensors, names, shapes and files of the receiving model. The engine calls `pieces` for every tensor
that `include` selects and that all models have, writes the results in the order in which they come, adds up their
`sums` and takes the root. With a flag `lam` (`hf_rb.weights.options.lambda_flag`) a user may give several lambdas:
each piece then has a result for every one of `self.lams`. An operation that yields several rows of the report for a
tensor, for instance one for each expert of a stack, ends each with `Piece.row`. `keeps` copies tensors that the method
cannot treat, `dtype` widens the result, `of_adapters` takes LoRA adapters, and `notes` go into the report.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import reduce
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod
from hf_rb.methods.rules import defaults_of
from hf_rb.utils.fields import validate
from hf_rb.weights.options import Options, check_lambdas
from hf_rb.weights.report import MergeReport, TensorReport


__all__ = ["ELEMENTS", "Job", "Operation", "Piece", "Request", "check_finite", "measure", "pieces", "square"]

ELEMENTS = 1 << 18  # of a piece: small enough for a processor's cache


NoFlags = make_dataclass("NoFlags", [])


@dataclass(frozen=True)
class Request:
    """
    Merge that was asked for.

    Attributes:
        models (`dict[str, str]`): Names as the user wrote them, by role; of several with a number, `"tuned 1"`.
        adapters (`dict[str, Path]`): Folders of those that are LoRA adapters, by role.
        destination (`Path`): Folder to write.
        options (`Options`): Options of every merge.
    """

    models: dict[str, str]
    adapters: dict[str, Path]
    destination: Path
    options: Options


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

    `sums` are added up over the pieces of a tensor, and their roots reported. `values` are reported as they are, the
    last ones of a tensor. `row` ends a row of the report before the tensor ends: its name, behind the tensor's.
    """

    results: Sequence[Tensor]
    sums: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    row: str | None = None


class Operation:
    """
    Operation on one tensor. A method is a subclass.

    Args:
        flags:
            Values of the method's flags.

    Attributes:
        method (`MergeMethod`): Its record.
        silent (`tuple[str, ...]`): Flags that do not change what is computed, and that no report needs.
        flags (`Any`): The flags, an instance of `method.flags`.
        lams (`tuple[float, ...]`): Lambdas, of a method with the flag `lam`.
        sweep (`tuple[float, ...]`, *optional*): The lambdas of several results; `None` for one result.
        include (`str`): Pattern of the tensors to change, where the user gives none.

    Raises:
        ValueError: A flag is out of range.
    """

    method: MergeMethod
    silent: tuple[str, ...] = ()

    def __init__(self, **flags: Any):
        self.flags: Any = (self.method.flags or NoFlags)(**flags)
        self.lams, self.sweep, self.include = (), None, self.method.include
        validate(self.flags, self.method.rules)
        for limits in [one.metadata["limits"] for one in fields(self.flags) if "limits" in one.metadata]:
            self.lams = check_lambdas(self.flags.lam, limits, getattr(self.flags, "extrapolate", None))
            self.sweep = None if isinstance(self.flags.lam, int | float) else self.lams

    def changed(self) -> list[str]:
        """Returns the flags that are not at their defaults."""
        return [name for name, default in defaults_of(self.method).items() if getattr(self.flags, name) != default]

    def of_adapters(self, request: Request) -> "Operation | MergeReport":
        """Merges adapters, or returns the operation that does it to the other models; of a method that takes some."""
        raise NotImplementedError

    def check_whole(self, request: Request) -> None:
        """Raises `ValueError` for options that only models have, where adapters are merged."""
        options = [name for name in ("include", "files_from", "dtype") if getattr(request.options, name) is not None]
        flags = [name for name in self.changed() if name not in ("lam", "extrapolate", *self.method.for_adapters)]
        if idle := [f"`{name}`" for name in (*flags, *options)]:
            raise ValueError(f"The result is an adapter, which is written as a whole: leave out {' and '.join(idle)}.")
        if self.sweep is not None:
            raise ValueError("Adapters take one lambda at a time; give one value.")

    def check(self, names: Iterable[str]) -> None:
        """Raises `ValueError` for flags that do not fit the receiving model, by the names of its tensors."""

    def keeps(self, name: str, entry: Entry) -> str | None:
        """Returns the reason for which a tensor that the user has included is copied nevertheless."""
        return None

    def dtype(self, entry: Entry, others: Mapping[str, Entry]) -> torch.dtype:
        """Returns the type of the result. Where it may be either of two models in all but weights, that is the one
        that holds both: else one of them could not be hit exactly.
        """
        types = [others[role].dtype for role in self.method.files_from if role in others]
        return reduce(torch.promote_types, types, entry.dtype)

    def pieces(self, job: Job) -> Iterator[Piece]:
        """Yields the tensor's pieces in order."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Returns the options that were asked for, for the report."""
        lam = {"lambda": self.lams[0] if self.sweep is None else list(self.lams)} if self.lams else {}
        shown = [name for name in defaults_of(self.method) if name not in ("extrapolate", *self.silent)]
        return lam | {name: getattr(self.flags, name) for name in shown if name != "lam" or not lam}

    def notes(self, rows: list[TensorReport]) -> list[str]:
        """Returns notes on the result for a user."""
        return []


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


def measure(
    receiving: Tensor, results: Sequence[Tensor], compared: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    """Returns the sums behind the norms of [`MergeReport`], with the difference of two models if they are given."""
    changes = [square(result.to(receiving.dtype).view(-1) - receiving) for result in results]
    if not all(map(isfinite, changes)):
        raise ValueError(
            f'the result is too large for {results[0].dtype}. Write `dtype="float32"` (`--dtype float32`).'
        )
    sums = {"norm": square(receiving), "change": torch.tensor(changes, dtype=torch.float64)}
    if compared is None:
        return sums
    one, other = compared
    difference = one - other
    return sums | {
        "difference": square(difference),
        "sigma": difference.abs().sum().item(),
        "absolute": (one.abs().sum() + other.abs().sum()).item(),
    }


def square(values: Tensor) -> float:
    return torch.dot(values.view(-1), values.view(-1)).item()
