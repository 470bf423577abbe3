"""Shadow-FT (https://huggingface.co/papers/2505.12716): fine-tune the Base model, add what it learned to the Instruct
model.

    W_I+ = W_I + (W_B+ - W_B)        W_B+ = Tune(W_B)

with LoRA  W_I+ = W_I + s B A  of the adapter that was trained on Base (s = alpha / r). It rests on Base and Instruct
being close,

    sigma(A, B) = sum |A - B| / (sum |A| + sum |B|)        0 for equal tensors, at most 1

A delta is small: a 16-bit Instruct model cannot hold all of it. How much of the wanted delta was lost is reported.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_rb.io.model_folder import find_model
from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod, Paper
from hf_rb.weights.adapters import Adapter, is_adapter, retarget
from hf_rb.weights.engine import merge
from hf_rb.weights.operation import ELEMENTS, Job, Operation, Options, Piece, check_finite, measure, pieces, square
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import Source


__all__ = ["graft", "graft_tensors", "sigma"]

METHOD = MergeMethod(
    key="shadow_ft",
    name="Shadow-FT",
    paper=Paper(
        "2505.12716",
        "Shadow-FT: Tuning Instruct Model via Training on Paired Base Model",
        "Taiqiang Wu, Runming Yang, Jiayi Li, Pengfei Hu, Yik-Chung Wu, Ngai Wong, Yujiu Yang",
    ),
    summary="Fine-tunes the Base model and adds what its weights have learned to those of the Instruct model.",
    models={},
)

LOSS = 0.05  # of the delta: from here on a note says so


def graft_tensors(base: Tensor, tuned: Tensor, onto: Tensor) -> Tensor:
    """Returns `onto + (tuned - base)`, and exactly `onto` where nothing was learned. Three tensors of one shape."""
    return torch.where(tuned == base, onto, onto + (tuned - base))


def sigma(one: Tensor, other: Tensor) -> float:
    """Returns how far two tensors of one shape are from each other, in [0, 1]; 0 for two tensors of zeros."""
    one, other = one.double(), other.double()
    total = one.abs().sum() + other.abs().sum()
    return ((one - other).abs().sum() / total).item() if total else 0.0


def graft(
    tuned: str | Path,
    onto: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    keep_adapter: bool = False,
    include: str | None = None,
    mismatch: str = "refuse",
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> MergeReport | None:
    """
    Adds to an Instruct model what its Base model has learned: in float32, rounded once, with the memory of a few
    pieces of a tensor.

    The folder appears at `destination` in one step when it is complete. Until then the work lies beside it in a hidden
    folder, from which the same call goes on after it was interrupted or killed. Everything but weights is the Instruct
    model's.

    Args:
        tuned (`str` or `Path`):
            The fine-tuned Base model, or the LoRA adapter that was trained on Base. Best saved in float32.
        onto (`str` or `Path`):
            The Instruct model.
        destination (`str` or `Path`):
            Folder to write.
        base (`str` or `Path`, *optional*):
            The Base model before its fine-tuning. Needed unless `tuned` is an adapter.
        keep_adapter (`bool`, *optional*, defaults to `False`):
            Whether an adapter stays one, of the Instruct model, which loses nothing by rounding. Returns `None` then.
        include (`str`, *optional*):
            Pattern of the tensors that get their delta. Defaults to `"linear"`, as in the authors' code, and for an
            adapter to all that it has.
        mismatch (`str`, *optional*, defaults to `"refuse"`):
            What happens to tensors that one model lacks or that have other shapes, and to embeddings of another
            vocabulary: `"refuse"` them, or `"skip"` them, which keeps the Instruct model's.
        dtype (`str`, *optional*):
            Type of all floating tensors. Defaults to that of the Instruct model; float32 loses nothing of the delta.
        overwrite, resume, progress:
            As in [`interpolate`].

    Returns:
        [`MergeReport`], or `None` for an adapter that was kept.

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or a shard is missing.
        ValueError: The models do not fit together, the adapter depends on the model it was trained on, a weight is
            NaN, or the unfinished work is another one.
    """
    folder = find_model(str(tuned), adapter=True)
    if is_adapter(folder):
        if base is not None:
            raise ValueError("An adapter holds its delta: leave out `base` (`--base`).")
        adapter = Adapter(folder, str(tuned))
        if keep_adapter:
            if include or dtype:
                raise ValueError("`keep_adapter` copies the adapter as it is: leave out `include` and `dtype`.")
            return retarget(adapter, Source("onto", onto), destination, overwrite)
        options = Options(include or "all", mismatch, None, dtype, overwrite, resume, progress)
        receiver = Source("onto", onto)
        return merge(AdapterGraft(adapter, receiver), [receiver], destination, options)
    if keep_adapter:
        raise ValueError(f"{tuned} is a model, not an adapter: leave out `keep_adapter` (`--keep-adapter`).")
    if base is None:
        raise ValueError(
            f"{tuned} is a model: give the Base model it was tuned from as well, `base=...` (`--base MODEL`), to "
            "know what it learned."
        )
    options = Options(include or "linear", mismatch, None, dtype, overwrite, resume, progress)
    sources = Source("onto", onto), Source("base", base), Source("tuned", tuned)
    return merge(Graft(), sources, destination, options)


class _Graft(Operation):
    method, files_from = "shadow_ft", ("onto",)

    def notes(self, rows: list[TensorReport]) -> list[str]:
        merged = [row.measured for row in rows if row.kept is None]
        wanted = sum(values["wanted"] ** 2 for values in merged) ** 0.5
        error = sum(values["error"] ** 2 for values in merged) ** 0.5
        if not wanted:
            return ["The delta is zero: nothing was learned, and nothing changed."]
        if error < LOSS * wanted:
            return []
        return [
            f'Rounding lost {error / wanted:.1%} of the delta. `dtype="float32"` (`--dtype float32`) keeps all of it, '
            "and so does an adapter that stays one (`--keep-adapter`)."
        ]


class Graft(_Graft):
    """The delta of a fully tuned Base model."""

    def pieces(self, job: Job) -> Iterator[Piece]:
        for onto, base, tuned in pieces(job.entry, job.others["base"], job.others["tuned"]):
            result = graft_tensors(base, tuned, onto).to(job.dtype)
            yield Piece([result], measure(onto, onto, base, [result]) | _applied(onto, tuned - base, result))


class AdapterGraft(_Graft):
    """The delta of a LoRA adapter, computed for as many rows as a piece has."""

    def __init__(self, adapter: Adapter, receiver: Source):
        self.adapter, self.modules = adapter, adapter.weights_of(receiver)

    def keeps(self, name: str, entry: Entry) -> str | None:
        return None if name in self.modules else "not in the adapter"

    def pieces(self, job: Job) -> Iterator[Piece]:
        delta_of, columns = self.adapter.delta(self.modules[job.name]), job.entry.shape[1]
        rows = max(1, ELEMENTS // columns)
        for number, onto in enumerate(job.entry.chunks(torch.float32, rows * columns)):
            check_finite(onto, str(job.entry.file))
            delta = delta_of(slice(number * rows, (number + 1) * rows)).reshape(-1)
            check_finite(delta, self.adapter.name)
            result = torch.where(delta == 0, onto, onto + delta).to(job.dtype)
            sums = measure(onto, onto, onto, [result])
            yield Piece([result], {key: sums[key] for key in ("norm", "change")} | _applied(onto, delta, result))

    def options(self):
        return {"adapter": self.adapter.public_name}


def _applied(onto: Tensor, wanted: Tensor, result: Tensor) -> dict[str, float]:
    return {"wanted": square(wanted), "error": square(result.to(onto.dtype) - onto - wanted)}
