"""Shadow-FT (https://huggingface.co/papers/2505.12716): fine-tune the Base model, add what it learned to the Instruct
model.

    W_I+ = W_I + (W_B+ - W_B)        W_B+ = Tune(W_B)

with LoRA  W_I+ = W_I + s B A  of the adapter that was trained on Base (s = alpha / r). It rests on Base and Instruct
being close,

    sigma(A, B) = sum |A - B| / (sum |A| + sum |B|)        0 for equal tensors, at most 1

A delta is small: a 16-bit Instruct model cannot hold all of it. How much of the wanted delta was lost is reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod, Paper, flag
from hf_rb.weights.adapters import Adapter, retarget
from hf_rb.weights.merging import documented_merge, merge_models
from hf_rb.weights.operation import ELEMENTS, Job, Operation, Piece, Request, check_finite, measure, pieces, square
from hf_rb.weights.options import Model
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import Source


__all__ = ["Graft", "graft", "graft_tensors", "sigma"]

LOSS = 0.05  # of the delta: from here on a note says so


def graft_tensors(base: Tensor, tuned: Tensor, onto: Tensor) -> Tensor:
    """Returns `onto + (tuned - base)`, and exactly `onto` where nothing was learned. Three tensors of one shape."""
    return torch.where(tuned == base, onto, onto + (tuned - base))


def sigma(one: Tensor, other: Tensor) -> float:
    """Returns how far two tensors of one shape are from each other, in [0, 1]; 0 for two tensors of zeros."""
    one, other = one.double(), other.double()
    total = one.abs().sum() + other.abs().sum()
    return ((one - other).abs().sum() / total).item() if total else 0.0


@dataclass
class GraftFlags:
    keep_adapter: bool = flag(
        False, "Whether an adapter stays one, of the Instruct model, which loses nothing by rounding."
    )


class Graft(Operation):
    """The delta of a tuned Base model."""

    method = MergeMethod(
        key="shadow_ft",
        command="graft",
        name="Shadow-FT",
        paper=Paper(
            "2505.12716",
            "Shadow-FT: Tuning Instruct Model via Training on Paired Base Model",
            "Taiqiang Wu, Runming Yang, Jiayi Li, Pengfei Hu, Yik-Chung Wu, Ngai Wong, Yujiu Yang",
        ),
        summary="Fine-tunes the Base model and adds what its weights have learned to those of the Instruct model.",
        models={
            "base": "the Base model it was tuned from",
            "tuned": "Base after its fine-tuning, best saved in float32, or its LoRA adapter",
            "onto": "the Instruct model that gets what Base has learned",
        },
        adapters=("tuned",),
        optional=("base",),
        for_adapters=("keep_adapter",),
        receiver="onto",
        flags=GraftFlags,
    )
    silent = ("keep_adapter",)

    def of_adapters(self, request: Request) -> Operation | MergeReport:
        adapter = Adapter(request.adapters["tuned"], request.models["tuned"])
        onto = Source("onto", request.models["onto"])
        if not self.flags.keep_adapter:
            return AdapterGraft(adapter, onto)
        self.check_whole(request)
        return retarget(adapter, onto, request.destination, request.options.overwrite)

    def pieces(self, job: Job) -> Iterator[Piece]:
        for onto, base, tuned in pieces(job.entry, job.others["base"], job.others["tuned"]):
            result = graft_tensors(base, tuned, onto).to(job.dtype)
            sums = measure(onto, [result], compared=(onto, base))
            yield Piece([result], sums | _applied(onto, tuned - base, result))

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


class AdapterGraft(Graft):
    """The delta of a LoRA adapter, computed for as many rows as a piece has."""

    def __init__(self, adapter: Adapter, receiver: Source):
        super().__init__()
        self.adapter, self.modules, self.include = adapter, adapter.weights_of(receiver), "all"

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
            yield Piece([result], measure(onto, [result]) | _applied(onto, delta, result))

    def options(self) -> dict[str, Any]:
        return {"adapter": self.adapter.public_name}


def _applied(onto: Tensor, wanted: Tensor, result: Tensor) -> dict[str, float]:
    return {"wanted": square(wanted), "error": square(result.to(onto.dtype) - onto - wanted)}


@documented_merge(Graft)
def graft(
    tuned: Model, onto: Model, destination: Model, *, base: Model | None = None, **options: Any
) -> MergeReport | None:
    """
    Adds to an Instruct model what its Base model has learned: in float32, rounded once, with the memory of a few
    pieces of a tensor. Everything but weights is the Instruct model's. Returns `None` for an adapter that stays one.

    By default the linear weights get their delta, as in the authors' code, and of an adapter all that it has.
    """
    report = merge_models(Graft, {"base": base, "tuned": tuned, "onto": onto}, destination, **options)
    return report if report.tensors else None
