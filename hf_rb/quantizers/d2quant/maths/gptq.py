r"""GPTQ and GPTAQ: columns are rounded one by one, and those that follow make up for the error.

With the inputs X of a matrix W as the quantized model has them, and X_fp as the original model does (tokens as
columns),

    H = 2/T X X',    C = 2/T (X_fp - X) X',    H^-1 = U'U  (U upper triangular),    P = a triu(C U', 1) U

and for every column j, from first to last, with its nearest levels q:

    e = (w_j - q) / U[j, j],    w_i <- w_i - e U[j, i] + w_j P[j, i]  for the columns i > j

GPTQ (https://huggingface.co/papers/2210.17323) is the case P = 0; GPTAQ (https://huggingface.co/papers/2504.02692)
lets the columns that follow make up for the error of the layers before as well. a = 0.25, and the order of the
columns, are those of https://huggingface.co/papers/2602.02546: groups by their largest H[j, j], falling, and the
columns of a group likewise. A group keeps its members, so that nothing has to be reordered at run time.

The scales of a group are fitted when its turn comes, to the columns as they are then. What the columns of one group do
to later groups is one matrix product. The result does not depend on that: where the released code takes the rounded
column for the second term of that product, here it is w_j as in the formula.

Inside, matrices are transposed, `(in_features, out_features)`: a column of the weight is a row of memory. The loop
over the columns of a group is in `columns.py`, in torch, and in `solver.c` for what lies in main memory.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from hf_rb.quantizers.d2quant.maths.columns import AffineMatrix, DualMatrix, round_columns
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes, check_weight


__all__ = ["ACT_ORDERS", "InputStatistics", "Stats", "group_aware_order", "inverse_factor", "quantize"]

ACT_ORDERS = ("gar", None)
# A matrix that has no Cholesky factor is damped ten times as much, until the damping is as large as what it damps.
MORE_DAMPING, MOST_DAMPING, SOME_DAMPING = 10.0, 1.0, 1e-3
BLOCK = 256


class InputStatistics:
    """
    Gathers H and C from the inputs of a linear layer.

    Args:
        in_features (`int`):
            Columns of the layer.
        cross (`bool`, *optional*, defaults to `False`):
            Whether C is gathered too.
        device (`torch.device`, *optional*):
            Where the sums are kept, float32: `in_features**2` numbers each.
    """

    def __init__(self, in_features: int, cross: bool = False, device: torch.device | str | None = None):
        self.tokens, self._finished = 0, False
        self._hessian = torch.zeros(in_features, in_features, device=device)
        self._cross = torch.zeros_like(self._hessian) if cross else None

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """
        Adds the tokens of a batch.

        Args:
            inputs (`torch.Tensor`):
                Inputs in the quantized model, `(..., in_features)`.
            original (`torch.Tensor`, *optional*):
                Inputs of the same tokens in the original model; needed if C is gathered.
        """
        if self._finished:
            raise ValueError(
                "These statistics have been read, so nothing can be added to them. Gather all tokens first."
            )
        inputs = inputs.reshape(-1, inputs.shape[-1]).to(self._hessian)
        self.tokens += len(inputs)
        self._hessian.addmm_(inputs.T, inputs)
        if self._cross is not None:
            there = cast(Tensor, original).reshape(inputs.shape).to(inputs)
            self._cross.addmm_((there - inputs).T, inputs)

    @property
    def hessian(self) -> Tensor:
        """H, `(in_features, in_features)`. Nothing can be added afterwards."""
        self._finish()
        return self._hessian

    @property
    def cross(self) -> Tensor | None:
        """C, `(in_features, in_features)`, if it was gathered. Nothing can be added afterwards."""
        self._finish()
        return self._cross

    def _finish(self) -> None:
        """Turns sums into means, in their place: of the largest matrices that there are, one copy counts."""
        if not self._finished and self.tokens:
            for total in (self._hessian, self._cross):
                if total is not None:
                    total.mul_(2 / self.tokens)
            self._finished = True


class Stats(NamedTuple):
    """
    Figures of [`quantize`] about a matrix.

    Attributes:
        percdamp (`float`): Damping that was used, more than asked for if the Hessian had no Cholesky factor with that.
        dead (`int`): Inputs that were always zero.
        weight_error (`float`): Frobenius norm of what the weight lost, over that of the weight.
        output_error (`float`): Root mean square of what the output lost on the calibration data, over that of the
            output.
    """

    percdamp: float
    dead: int
    weight_error: float
    output_error: float


def quantize(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor | None = None,
    *,
    bits: int,
    group_size: int = 128,
    act_order: str | None = "gar",
    percdamp: float = 0.01,
    asym_alpha: float = 0.25,
    dual: bool = False,
    dsq_iters: int = 15,
    dsq_weighting: str = "none",
    clip_search: bool = True,
) -> tuple[AffineCodes | DualCodes, Stats]:
    """
    Quantizes a matrix with GPTQ, or with GPTAQ if `cross` is given.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(out_features, in_features)`, any floating type. Matrices with the same inputs may be
            stacked.
        hessian (`torch.Tensor`):
            H, `(in_features, in_features)`, from [`InputStatistics`]. Any positive multiple gives the same result.
        cross (`torch.Tensor`, *optional*):
            C, of the same shape and with the same multiple. Without it, or where it is zero, this is GPTQ.
        dual (`bool`, *optional*, defaults to `False`):
            Whether the levels are those of dual-scale quantization, with `bits` planes, instead of affine grids.
        bits, group_size, act_order, percdamp, asym_alpha, dsq_iters, dsq_weighting, clip_search:
            As in [`~hf_rb.D2QuantConfig`].

    Returns:
        `tuple`: [`AffineCodes`], or [`DualCodes`] if `dual`; and [`Stats`].

    Raises:
        ValueError: The weight is not a floating matrix, or has a value that is no number or too large for float16
            scales; the Hessian does not fit it, is not finite, or has no Cholesky factor however much it is damped.
    """
    original = check_weight(weight).float()
    _check(original, hessian, cross, act_order)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    groups, order = group_aware_order(diagonal, group_size, act_order)
    factor, percdamp = inverse_factor(hessian.float(), percdamp, order)
    residual = None if cross is None else _residual_factor(cross[order][:, order].float(), factor, asym_alpha)

    weights = factor.diagonal().pow(-2) if dsq_weighting == "hessian" else None
    rest = original.masked_fill(dead, 0).T[order]
    matrix = (
        DualMatrix(rest, group_size, bits, dsq_iters, dead[order], weights)
        if dual
        else AffineMatrix(rest, group_size, bits, clip_search)
    )
    first, extra = 0, None
    for group, length in groups:
        here, later = slice(first, first + length), slice(first + length, None)
        block, extra = rest[here], None if residual is None else residual[here]
        columns = matrix.fit(group, here, block)
        errors = round_columns(
            columns, block, factor[here, here], None if extra is None else extra[:, here], matrix.codes[here]
        )
        rest[later].addmm_(factor[here, later].T, errors, alpha=-1)
        if extra is not None:
            rest[later].addmm_(extra[:, later].T, block)
        first += length
    del factor, residual, extra, rest  # each as large as H or the weight
    quantized = matrix.finish(order)
    return quantized, _stats(original, quantized.dequantize(), hessian.float(), percdamp, int(dead.sum()))


def group_aware_order(
    diagonal: Tensor, group_size: int, act_order: str | None = "gar"
) -> tuple[list[tuple[int, int]], Tensor]:
    """
    Returns the order in which columns are quantized.

    Args:
        diagonal (`torch.Tensor`):
            Of the Hessian, `(in_features,)`.
        group_size (`int`):
            Columns of a group; the last may have fewer.
        act_order (`str` or `None`, *optional*, defaults to `"gar"`):
            As for [`quantize`].

    Returns:
        `tuple[list[tuple[int, int]], torch.Tensor]`: Index and length of every group, and the columns
        `(in_features,)`, both in the order in which they are taken. Equal ones stay as they are.
    """
    if act_order is None:
        parts = torch.arange(len(diagonal), device=diagonal.device).split(group_size)
        return list(enumerate(map(len, parts))), torch.cat(parts)
    parts = diagonal.split(group_size)
    inner = [part.argsort(descending=True, stable=True) + i * group_size for i, part in enumerate(parts)]
    outer = torch.stack([part.max() for part in parts]).argsort(descending=True, stable=True).tolist()
    return [(group, len(parts[group])) for group in outer], torch.cat([inner[group] for group in outer])


def inverse_factor(hessian: Tensor, percdamp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """
    Returns U with `U'U = (H + damping)^-1`, upper triangular, and the share of the diagonal's mean that damps it.

    Inputs that are always zero, with a row of zeros in H, come out as if they were independent of all others.

    Args:
        hessian (`torch.Tensor`):
            H, `(in_features, in_features)`.
        percdamp (`float`):
            Share to begin with.
        order (`torch.Tensor`, *optional*):
            Order in which U has the columns; by default theirs.

    Raises:
        ValueError: No damping helps.
    """
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    diagonal, back = hessian.diagonal()[order], order.flip(0)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    while True:
        # With the order reversed, H is A A' for an upper triangular A, and U its inverse: one factorization, no
        # inverse of H.
        factor = hessian[back][:, back]
        factor.diagonal().add_(torch.where(live, percdamp * mean, mean).flip(0))
        factor, failed = torch.linalg.cholesky_ex(factor)
        if not failed:
            factor = factor.flip(0, 1)  # a matrix this large is not kept longer than it is needed
            upper = _invert_upper(factor)
            if upper.isfinite().all():
                return upper, percdamp
        if percdamp >= MOST_DAMPING:
            raise ValueError(f"The Hessian has no Cholesky factor, not even with a damping of {percdamp:.3g}.")
        percdamp = min(MOST_DAMPING, max(SOME_DAMPING, MORE_DAMPING * percdamp))


def _invert_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: a third of the work of solving for the identity."""
    size = len(matrix)
    if size <= BLOCK:
        return torch.linalg.solve_triangular(matrix, torch.eye(size).to(matrix), upper=True)
    first, last = slice(0, size // 2), slice(size // 2, None)
    inverse = torch.zeros_like(matrix)
    inverse[first, first], inverse[last, last] = _invert_upper(matrix[first, first]), _invert_upper(matrix[last, last])
    inverse[first, last] = -inverse[first, first] @ (matrix[first, last] @ inverse[last, last])
    return inverse


def _residual_factor(cross: Tensor, factor: Tensor, asym_alpha: float) -> Tensor:
    """Returns P, in blocks of columns and without what a triangle has of zeros: a quarter of the work."""
    size, result = len(cross), torch.zeros_like(cross)
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        result[:last, first:last] = cross[:last, first:] @ factor[first:last, first:].T
    result.triu_(1).mul_(asym_alpha)
    # In place, from the last: what a block of columns reads lies before it, or is itself.
    for first in reversed(range(0, size, BLOCK)):
        last = min(first + BLOCK, size)
        result[:last, first:last] = result[:last, :last] @ factor[:last, first:last]
    return result


def _stats(original: Tensor, quantized: Tensor, hessian: Tensor, percdamp: float, dead: int) -> Stats:
    lost = original - quantized
    output, lost_output = ((weight @ hessian * weight).sum().item() for weight in (original, lost))
    weight_error = (lost.norm() / original.norm().clamp_(min=torch.finfo(torch.float32).tiny)).item()
    return Stats(percdamp, dead, weight_error, (max(lost_output, 0) / output) ** 0.5 if output > 0 else 0.0)


def _check(weight: Tensor, hessian: Tensor, cross: Tensor | None, act_order: str | None) -> None:
    expected = (weight.shape[1], weight.shape[1])
    for name, matrix in (("hessian", hessian), ("cross", cross)):
        if matrix is None:
            continue
        if matrix.shape != expected:
            raise ValueError(
                f"`{name}` must be {expected} for a weight {tuple(weight.shape)}; got {tuple(matrix.shape)}."
            )
        if not matrix.isfinite().all():
            raise ValueError(f"`{name}` has a NaN or an infinite value: so had the inputs that it was gathered from.")
    if act_order not in ACT_ORDERS:
        raise ValueError(f"`act_order` must be 'gar' or None; got {act_order!r}.")
