"""Model interpolation (https://huggingface.co/papers/2510.10977): every weight between two models, on a straight line.

    W(lambda) = lambda W_end + (1 - lambda) W_start

With an Instruct model as the start and a Thinking model as the end, a larger lambda thinks longer and more often. It
is task arithmetic with the weights 1 - lambda and lambda whatever the base, which cancels, and WiSE-FT if start and
end are a model before and after its fine-tuning.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.model_folder import find_model
from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod, Paper
from hf_rb.weights.adapters import combine_adapters, is_adapter
from hf_rb.weights.engine import merge
from hf_rb.weights.operation import Job, Operation, Options, Piece, check_lambdas, measure, pieces
from hf_rb.weights.patterns import matcher, select
from hf_rb.weights.report import MergeReport
from hf_rb.weights.source import Source


__all__ = ["interpolate", "interpolate_tensors"]

METHOD = MergeMethod(
    key="interpolation",
    name="Model interpolation",
    paper=Paper(
        "2510.10977",
        "Revisiting Model Interpolation for Efficient Reasoning",
        "Taiqiang Wu, Runming Yang, Tao Liu, Jiahao Wang, Ngai Wong",
    ),
    summary="Every weight on the straight line between two models, such as an Instruct and a Thinking model, "
    "whose place on it sets how long the result thinks.",
    models={},
)


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


def interpolate(
    start: str | Path,
    end: str | Path,
    destination: str | Path,
    lam: float | Sequence[float] = 0.5,
    *,
    rules: Mapping[str, float] | None = None,
    rank: int | None = None,
    include: str = "all",
    files_from: str | None = None,
    mismatch: str = "refuse",
    extrapolate: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> MergeReport:
    """
    Writes models between two models, with the memory of a few pieces of a tensor: in float32, rounded once.

    The folder appears at `destination` in one step when it is complete. Until then the work lies beside it in a hidden
    folder, from which the same call goes on after it was interrupted or killed.

    Args:
        start, end (`str` or `Path`):
            Models for lambda 0 and 1: embedded models (`"tiny:student"`), folders or Hub ids.
        destination (`str` or `Path`):
            Folder to write; of a sweep, the folder of the folders `lambda-0.2`, ….
        lam (`float` or sequence of `float`, *optional*, defaults to `0.5`):
            Lambda in [0, 1]. Several values write as many models while both are read once.
        rules (`dict`, *optional*):
            Other lambdas for some tensors, by pattern (see `hf_rb.weights.patterns`); the first one that fits holds.
        rank (`int`, *optional*):
            Of two LoRA adapters, the rank of the result; by default both in one, which is exact (see
            [`combine_adapters`]).
        include (`str`, *optional*, defaults to `"all"`):
            Pattern of the tensors to interpolate; the others are the start's.
        files_from (`str`, *optional*):
            `"start"` or `"end"`: whose configuration, tokenizer, chat template and generation config the result gets.
            Must be said where they differ.
        mismatch (`str`, *optional*, defaults to `"refuse"`):
            What happens to tensors that one model lacks or that have other shapes, and to embeddings of another
            vocabulary: `"refuse"` them, or `"skip"` them, which keeps the start's.
        extrapolate (`bool`, *optional*, defaults to `False`):
            Whether lambdas outside [0, 1] are meant.
        dtype (`str`, *optional*):
            Type of all floating tensors. By default that of both models, or where they differ the one that holds both.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a folder that is not empty.
        resume (`bool`, *optional*, defaults to `True`):
            Whether to go on with unfinished work of an earlier call; `False` throws it away.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar, on a terminal.

    Returns:
        [`MergeReport`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or a shard is missing.
        ValueError: The models do not fit together, a lambda is out of range, a pattern means nothing, a weight is NaN,
            or the unfinished work is another one.
    """
    folders = [find_model(str(name), adapter=True) for name in (start, end)]
    if any(map(is_adapter, folders)):
        asked = rules or include != "all" or files_from or dtype
        return _interpolate_adapters(
            [start, end], folders, destination, lam, extrapolate, rank, bool(asked), overwrite
        )
    if rank is not None:
        raise ValueError("`rank` (`--rank`) is for adapters; these are models.")
    options = Options(include, mismatch, files_from, dtype, overwrite, resume, progress)
    lams, rules = check_lambdas(lam, extrapolate), dict(rules or {})
    for value in rules.values():
        check_lambdas(value, extrapolate)
    sources = Source("start", start), Source("end", end)
    for pattern in rules:
        select(pattern, sources[0].entries)
    operation = Interpolation(lams, rules)
    operation.sweep = None if isinstance(lam, int | float) else lams
    return merge(operation, sources, destination, options)


def _interpolate_adapters(
    names: list[str | Path],
    folders: list[Path],
    destination: str | Path,
    lam: float | Sequence[float],
    extrapolate: bool,
    rank: int | None,
    asked: bool,
    overwrite: bool,
) -> MergeReport:
    if not all(map(is_adapter, folders)):
        raise ValueError(
            f"Of {names[0]} and {names[1]} one is an adapter and one a model. Merge the adapter into its model first."
        )
    if asked:
        raise ValueError("Two adapters are interpolated as a whole: leave out rules, include, files_from and dtype.")
    lams = check_lambdas(lam, extrapolate)
    if not isinstance(lam, int | float):
        raise ValueError("Adapters are interpolated with one lambda at a time; give one value.")
    return combine_adapters(names, [1 - lams[0], lams[0]], destination, rank=rank, overwrite=overwrite)


class Interpolation(Operation):
    """The equation above, with a lambda of its own for the tensors that a rule names."""

    method, files_from = "interpolation", ("start", "end")

    def __init__(self, lams: tuple[float, ...], rules: dict[str, float]):
        self.lams, self.rules = lams, rules
        self.matchers = [(matcher(pattern), lam) for pattern, lam in rules.items()]

    def lambdas(self, name: str) -> tuple[float, ...]:
        """The lambda of a tensor in each result."""
        rule = next((lam for match, lam in self.matchers if match(name)), None)
        return self.lams if rule is None else (rule,) * len(self.lams)

    def dtype(self, entry: Entry, others: Mapping[str, Entry]) -> torch.dtype:
        # Else one of the ends could not be hit exactly.
        return torch.promote_types(entry.dtype, others["end"].dtype)

    def pieces(self, job: Job) -> Iterator[Piece]:
        lams = self.lambdas(job.name)
        for start, end in pieces(job.entry, job.others["end"]):
            results = [interpolate_tensors(start, end, lam).to(job.dtype) for lam in lams]
            yield Piece(results, measure(start, end, start, results))

    def options(self) -> dict[str, Any]:
        return {"lambda": self.lams[0] if self.sweep is None else list(self.lams), "rules": self.rules}
