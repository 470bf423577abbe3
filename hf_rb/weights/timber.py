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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rb.io.model_folder import find_model
from hf_rb.io.safetensors import Entry
from hf_rb.methods import MergeMethod, Paper
from hf_rb.weights.adapters import Adapter, factor_svd, is_adapter, write_adapter
from hf_rb.weights.engine import merge
from hf_rb.weights.operation import Job, Operation, Options, Piece, check_finite, check_lambdas, measure
from hf_rb.weights.report import MergeReport, TensorReport
from hf_rb.weights.source import Source


__all__ = ["Spectrum", "effective_rank", "kept_rank", "refine", "refine_tensors", "singular_values"]

METHOD = MergeMethod(
    key="timber",
    name="Timber",
    paper=Paper(
        "2509.23595",
        "Timber: Training-free Instruct Model Refining with Base via Effective Rank",
        "Taiqiang Wu, Runming Yang, Tao Liu, Jiahao Wang, Zenan Xu, Ngai Wong",
    ),
    summary="Weakens, in every weight matrix of an Instruct model, the part of its difference from Base that "
    "lies behind the difference's effective rank; without training.",
    models={},
)


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


def refine(
    base: str | Path | None,
    model: str | Path,
    destination: str | Path,
    lam: float | Sequence[float] = 0.2,
    *,
    include: str = "linear",
    mismatch: str = "refuse",
    extrapolate: bool = False,
    spectra: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> MergeReport:
    """
    Refines an Instruct model by its Base model, matrix by matrix, in the memory of one matrix in float64; without
    training and data.

    The folder appears at `destination` in one step when it is complete. Until then the work lies beside it in a hidden
    folder, from which the same call goes on after it was interrupted or killed. Everything but weights is the Instruct
    model's, and so is every tensor that is no matrix. The matrices of fused experts are refined one by one.

    Args:
        base (`str` or `Path`, *optional*):
            The Base model. `None` for an adapter, whose own delta is refined (ours, not the paper's).
        model (`str` or `Path`):
            The Instruct model, or any model that was tuned from Base; or a LoRA adapter.
        destination (`str` or `Path`):
            Folder to write; of a sweep, the folder of the folders `lambda-0.2`, ….
        lam (`float` or sequence of `float`, *optional*, defaults to `0.2`):
            Factor of the tail in [0, 1]: 1 changes nothing, 0 cuts it off.
        include (`str`, *optional*, defaults to `"linear"`):
            Pattern of the tensors to refine. `"all"` is what the released code does; embeddings then take most of the
            time.
        mismatch (`str`, *optional*, defaults to `"refuse"`):
            What happens to tensors that Base lacks or that have other shapes there, and to embeddings of another
            vocabulary: `"refuse"` them, or `"skip"` them, which keeps the Instruct model's.
        extrapolate (`bool`, *optional*, defaults to `False`):
            Whether lambdas outside [0, 1] are meant.
        spectra (`bool`, *optional*, defaults to `True`):
            Whether the effective ranks of both models are reported too, which takes about as long again.
        device (`str`, *optional*):
            Where matrices are decomposed. Defaults to the GPU if there is one.
        dtype (`str`, *optional*):
            Type of all floating tensors. Defaults to that of the Instruct model.
        overwrite, resume, progress:
            As in [`interpolate`].

    Returns:
        [`MergeReport`]

    Raises:
        FileExistsError: The destination is not empty and `overwrite` is `False`.
        FileNotFoundError: There is no such model, or a shard is missing.
        ValueError: The models do not fit together, a lambda is out of range, a pattern means nothing, a weight is NaN,
            or the unfinished work is another one.
    """
    lams = check_lambdas(lam, extrapolate)
    folder = find_model(str(model), adapter=True)
    if is_adapter(folder):
        if base is not None or len(lams) > 1 or include != "linear" or dtype:
            raise ValueError("An adapter is refined by itself, with one lambda: leave out base, include and dtype.")
        return refine_adapter(folder, str(model), destination, lams[0], overwrite)
    if base is None:
        raise ValueError(f"{model} is a model: give its Base model as well (`--base MODEL`).")
    options = Options(include, mismatch, None, dtype, overwrite, resume, progress)
    operation = Timber(lams, spectra, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    operation.sweep = None if isinstance(lam, int | float) else lams
    return merge(operation, [Source("model", model), Source("base", base)], destination, options)


def refine_adapter(
    folder: Path, name: str, destination: str | Path, lam: float, overwrite: bool = False
) -> MergeReport:
    """
    Refines the deltas of a LoRA adapter, which are again of its rank. Not in the paper: there D is the whole
    difference of two models.
    """
    adapter = Adapter(folder, name)
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
        measured = {key: getattr(spectrum, key) for key in ("erank", "k", "rank", "energy")}
        measured |= {"norm": values.norm().item(), "change": (1 - lam) * spectrum.tail}
        report.tensors.append(TensorReport(module, a.shape[1] * b.shape[0], measured=measured))
    write_adapter(destination, [adapter], factors, report, overwrite)
    return report


class Timber(Operation):
    """The equations above, for every matrix of a tensor."""

    method, files_from = "timber", ("model",)

    def __init__(self, lams: tuple[float, ...], spectra: bool, device: str):
        self.lams, self.spectra, self.device = lams, spectra, device

    def keeps(self, name: str, entry: Entry) -> str | None:
        return "no matrix" if len(entry.shape) < 2 else None

    def pieces(self, job: Job) -> Iterator[Piece]:
        experts = range(job.entry.shape[0]) if len(job.entry.shape) == 3 else [None]
        for expert in experts:
            model, base = (self._read(entry, expert) for entry in (job.entry, job.others["base"]))
            suffix = "" if expert is None else f"[{expert}]"
            try:
                refined, spectrum = refine_tensors(base, model, self.lams)
                values = {key: getattr(spectrum, key) for key in ("erank", "k", "rank", "energy")}
                if self.spectra:
                    values |= {
                        "erank_base": effective_rank(singular_values(base)),
                        "erank_model": effective_rank(singular_values(model)),
                    }
            except torch.linalg.LinAlgError:
                refined, values = [model] * len(self.lams), {"failed": True}
            results = [matrix.to(job.dtype).cpu().view(-1) for matrix in refined]
            flat_model, flat_base = model.cpu().view(-1), base.cpu().view(-1)
            yield Piece(results, measure(flat_model, flat_model, flat_base, results), (suffix, values))

    def _read(self, entry: Entry, expert: int | None) -> Tensor:
        matrix = entry.read(expert).to(self.device, torch.float64)
        check_finite(matrix, str(entry.file))
        return matrix if matrix.ndim == 2 else matrix.view(matrix.shape[0], -1)

    def options(self) -> dict[str, Any]:
        return {"lambda": self.lams[0] if self.sweep is None else list(self.lams), "spectra": self.spectra}

    def notes(self, rows: list[TensorReport]) -> list[str]:
        failed = [row.name for row in rows if row.measured.get("failed")]
        return (
            [f"{len(failed)} matrices ({failed[0]}, …) could not be decomposed and stay as they are."]
            if failed
            else []
        )
