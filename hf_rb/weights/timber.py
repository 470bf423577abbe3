"""Timber (https://huggingface.co/papers/2509.23595): weaken the tail of what instruction tuning has changed.

    D = W_I - W_B = sum_i S_i u_i v_i^T        S descending
    pi_i = S_i / sum_j S_j        eRank(D) = exp(-sum_i pi_i log pi_i)        k = ceil(eRank(D))
    W = W_B + sum_{i <= k} S_i u_i v_i^T + lambda sum_{i > k} S_i u_i v_i^T

so that lambda = 1 is the Instruct model and lambda = 0 cuts the tail off. With T the tail, W = W_I - (1 - lambda) T,
which is how it is computed here, in float64 by the eigenvectors of the smaller Gram matrix: T = (1 - U_k U_k^T) D.

The released code calls lambda gamma, rounds the rank up from float32 (a flat spectrum of 6 gives 7), and treats fused
experts as one matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod, Metric, Paper, flag
from hf_rb.weights.adapters import Adapter, factor_svd, write_adapter
from hf_rb.weights.merging import documented_merge, merge_models
from hf_rb.weights.operation import Job, Operation, Piece, Request, check_finite, measure
from hf_rb.weights.options import Extrapolating, Lambdas, Model, lambda_flag
from hf_rb.weights.report import MergeReport, TensorReport


__all__ = ["Spectrum", "Timber", "effective_rank", "kept_rank", "refine", "refine_tensors", "singular_values"]


@dataclass(frozen=True)
class Spectrum:
    """
    Spectrum of a matrix of differences, as Timber reads it.

    Attributes:
        erank (`float`): Effective rank, from 1 to `rank`; 0 for a matrix of zeros.
        k (`int`): Singular values that stay as they are.
        rank (`int`): The smaller side of the matrix.
        energy (`float`): Share of the squares of the singular values that the first k have.
        tail (`float`): Frobenius norm of the rest.
    """

    erank: float
    k: int
    rank: int
    energy: float
    tail: float

    def reported(self) -> dict[str, float]:
        return {key: value for key, value in vars(self).items() if key != "tail"}

    @classmethod
    def of(cls, values: Tensor) -> "Spectrum":
        """From all singular values, descending."""
        erank = effective_rank(values)
        k = kept_rank(erank, len(values))
        total, kept = values.square().sum().item(), values[:k].square().sum().item()
        return cls(erank, k, len(values), kept / total if total else 1.0, values[k:].norm().item())


def effective_rank(singular_values: Tensor) -> float:
    """Returns exp of the entropy of the normalized singular values, `(r,)` and not negative; 0 if all of them are
    0.
    """
    values = singular_values.double()
    values = values[values > 0]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return exp(-(shares * shares.log()).sum().item())


def kept_rank(erank: float, rank: int) -> int:
    """Returns k: the effective rank rounded up, but for what arithmetic adds to a whole number."""
    return min(rank, ceil(erank - 1e-6))


def singular_values(matrix: Tensor) -> Tensor:
    """Returns the singular values of a matrix in float64, descending, by its smaller Gram matrix."""
    return _values(torch.linalg.eigvalsh(_gram(matrix.double())).flip(0))


def refine_tensors(base: Tensor, model: Tensor, lams: Sequence[float]) -> tuple[list[Tensor], Spectrum]:
    """
    Refines a matrix.

    Args:
        base, model (`torch.Tensor` of shape `(out, in)`):
            Weights of Base and Instruct.
        lams (`Sequence[float]`):
            What the singular values behind the k-th are multiplied with, in [0, 1]; a result for each.

    Returns:
        `tuple[list[torch.Tensor], Spectrum]`: The refined matrices in float64, and what was found.
    """
    model = model.double()
    difference = model - base.double()
    wide = difference.shape[0] <= difference.shape[1]
    rows = difference if wide else difference.mT  # the smaller side first
    squares, vectors = torch.linalg.eigh(_gram(rows))
    values = _values(squares.flip(0))
    spectrum = Spectrum.of(values)
    k = spectrum.k
    if not spectrum.tail:
        return [model] * len(lams), spectrum
    tail = vectors[:, : len(values) - k]  # ascending: the last k are those that stay
    # The cheaper of two equal projections.
    rest = tail @ (tail.mT @ rows) if len(values) < 2 * k else rows - vectors[:, -k:] @ (vectors[:, -k:].mT @ rows)
    rest = rest if wide else rest.mT
    return [model if lam == 1 else model - (1 - lam) * rest for lam in lams], spectrum


def _gram(matrix: Tensor) -> Tensor:
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return rows @ rows.mT


def _values(squares: Tensor) -> Tensor:
    # Values below the accuracy of the Gram matrix are taken as zero: their roots would be numerous and large.
    noise = squares.new_tensor(torch.finfo(squares.dtype).eps) * len(squares) * squares.amax().clamp(min=0)
    return torch.where(squares > noise, squares, 0).sqrt()


@dataclass
class TimberFlags(Extrapolating):
    lam: Lambdas = lambda_flag(0.2, "Factor of the tail: 1 changes nothing, 0 cuts it off")
    spectra: bool = flag(
        True, "Whether the effective ranks of both models are reported too, which takes about as long again."
    )
    device: str | None = flag(None, "Where matrices are decomposed. Defaults to the GPU if there is one.")


class Timber(Operation):
    """The equations above, for every matrix of a tensor."""

    method = MergeMethod(
        key="timber",
        name="Timber",
        paper=Paper(
            "2509.23595",
            "Timber: Training-free Instruct Model Refining with Base via Effective Rank",
            "Taiqiang Wu, Runming Yang, Tao Liu, Jiahao Wang, Zenan Xu, Ngai Wong",
        ),
        summary="Weakens, in every weight matrix of an Instruct model, the part of its difference from Base that "
        "lies behind the difference's effective rank; without training.",
        models={
            "base": "its Base model",
            "model": "the Instruct model, or any that was tuned from Base; or a LoRA adapter, without Base",
        },
        adapters=("model",),
        optional=("base",),
        receiver="model",
        flags=TimberFlags,
        metrics=(
            Metric(
                "erank Base",
                "effective rank, the number of directions that count, mean over matrices",
                "[0, inf)",
                stat="erank_base",
            ),
            Metric("erank model", "the same of the Instruct model", "[0, inf)", stat="erank_model"),
            Metric("erank D", "the same of D, their difference", "[0, inf)", stat="erank"),
            Metric("k", "directions of D that stay as they are; those behind are multiplied by lambda", "[0, inf)"),
            Metric("rank", "all directions of D", "[0, inf)"),
            Metric("energy kept", "share of the first k in the square of D's norm", "[0, 1]", stat="energy"),
        ),
    )
    silent = ("device",)

    def __init__(self, **flags: Any):
        super().__init__(**flags)
        self.device = self.flags.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def of_adapters(self, request: Request) -> MergeReport:
        """
        Refines the deltas of a LoRA adapter, which are again of its rank. Not in the paper: there D is the whole
        difference of two models.
        """
        self.check_whole(request)
        lam = self.lams[0]
        adapter = Adapter(request.adapters["model"], request.models["model"])
        report = MergeReport("timber", {"model": adapter.public_name}, "model", {"lambda": lam})
        report.notes.append("Refining the delta of an adapter is hf_rb's extension, not in the paper.")
        factors = {}
        for module in adapter.modules:
            a, b = adapter.factors(module)
            u, values, v = factor_svd(a, b)
            spectrum = Spectrum.of(values)
            if lam != 1 and spectrum.tail:
                values = torch.where(torch.arange(len(values)) < spectrum.k, values, lam * values)
                a, b = (v * values.sqrt()).mT.float(), (u * values.sqrt()).float()
            factors[module] = a, b
            measured = spectrum.reported() | {"norm": values.norm().item(), "change": (1 - lam) * spectrum.tail}
            report.tensors.append(TensorReport(module, a.shape[1] * b.shape[0], measured=measured))
        write_adapter(request.destination, [adapter], factors, report, request.options.overwrite)
        return report

    def keeps(self, name: str, entry: Entry) -> str | None:
        return "no matrix" if len(entry.shape) < 2 else None

    def pieces(self, job: Job) -> Iterator[Piece]:
        experts = range(job.entry.shape[0]) if len(job.entry.shape) == 3 else [None]
        for expert in experts:
            model, base = (self._read(entry, expert) for entry in (job.entry, job.others["base"]))
            suffix = "" if expert is None else f"[{expert}]"
            try:
                refined, spectrum = refine_tensors(base, model, self.lams)
                values = spectrum.reported()
                if self.flags.spectra:
                    values |= {
                        "erank_base": effective_rank(singular_values(base)),
                        "erank_model": effective_rank(singular_values(model)),
                    }
            except torch.linalg.LinAlgError:
                refined, values = [model] * len(self.lams), {"failed": True}
            results = [matrix.to(job.dtype).cpu().view(-1) for matrix in refined]
            flat_model, flat_base = model.cpu().view(-1), base.cpu().view(-1)
            yield Piece(results, measure(flat_model, results, compared=(flat_model, flat_base)), values, suffix)

    def _read(self, entry: Entry, expert: int | None) -> Tensor:
        matrix = entry.read(expert).to(self.device, torch.float64)
        check_finite(matrix, str(entry.file))
        return matrix if matrix.ndim == 2 else matrix.view(matrix.shape[0], -1)

    def notes(self, rows: list[TensorReport]) -> list[str]:
        failed = [row.name for row in rows if row.measured.get("failed")]
        text = "{} matrices ({}, …) could not be decomposed and stay as they are."
        return [text.format(len(failed), failed[0])] if failed else []


@documented_merge(Timber)
def refine(
    base: Model | None, model: Model, destination: Model, lam: Lambdas = TimberFlags.lam, **options: Any
) -> MergeReport:
    """
    Refines an Instruct model by its Base model, matrix by matrix, in the memory of some copies of one in float64;
    without training and data.

    Everything but weights is the Instruct model's, and so is every tensor that is no matrix. The matrices of fused
    experts are refined one by one, and an adapter's own delta, which is ours, not the paper's. With the pattern
    `"all"`, as in the released code, embeddings take most of the time.
    """
    return merge_models(Timber, {"base": base, "model": model}, destination, lam=lam, **options)
