r"""Dual-scale quantization (DSQ, https://huggingface.co/papers/2602.02546): sign planes with a scale for each row and
each column.

A block X of G neighbouring columns, one quantization group of every row, becomes

    X[i, j]  ~  c[j] * sum_k r[i, k] B[k, i, j],    B in {-1, +1},    r >= 0,    c >= 0

with K planes: 2^K levels a row, symmetric and not equally spaced. The row scales r are stored; the column scales c
multiply the input of the matrix, and in a gated MLP they move into the scales of the projection before it, where they
cost nothing.

After a greedy start, three exact half-steps alternate, none of which increases the squared error:

1. rows: least squares for r, K x K normal equations a row; a negative scale flips the signs of its plane;
2. columns: least squares for c;
3. codes: for every weight the nearest of the 2^K levels.

The error may count each column with a weight g[j] of its own, sum_ij g[j] (X - X~)^2[i, j]: only the sums over columns
in step 1 change. The paper and its code count all columns alike; weights are ours.

A row whose planes are linearly dependent keeps its scales in step 1 (the released code divides by a clamped
determinant there). Scaling c by a factor and r by its inverse changes nothing; stored columns have a geometric mean of
1 over each group. Sign planes have no zero: a column of zeros has the scale 0, and counts in no mean.

This file is the reference, in torch, for any device and type. `solver.c` has the fit for float32 in main memory.

Shapes: N rows, G columns, K planes; `(..., N, G)` are blocks that do not depend on each other.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hf_rb.quantizers.d2quant.maths import native
from hf_rb.quantizers.d2quant.maths.grids import check_weight
from hf_rb.quantizers.kernels.layout import sections


__all__ = ["DualCodes", "DualScale", "Levels", "fit_dsq", "fit_levels", "round_to_nearest", "signs_of"]

SMALLEST_COLUMN = 1e-8
# Of the Cholesky factor of the planes' correlations: planes of a row that differ in one of 10^4 weights have 0.02.
DEPENDENT = 1e-3


class DualScale(NamedTuple):
    """
    Result of [`fit_dsq`].

    Attributes:
        row_scales (`torch.Tensor`): r, `(..., N, K)`.
        column_scale (`torch.Tensor`): c, `(..., G)`.
        signs (`torch.Tensor`): B, int8 `(K, ..., N, G)`.
        objective (`list[float]`): Squared error of all blocks at the start and after every half-step.
    """

    row_scales: Tensor
    column_scale: Tensor
    signs: Tensor
    objective: list[float]


@dataclass
class DualCodes:
    """
    A matrix of sign planes with scales for its rows and columns.

    Args:
        signs (`torch.Tensor`):
            int8 `(planes, out_features, in_features)`, -1 or 1.
        row_scale (`torch.Tensor`):
            float16 `(out_features, groups, planes)`.
        column_scale (`torch.Tensor`):
            float32 `(in_features,)`, of geometric mean 1 over each group; 0 for columns of zeros.
        group_size (`int`):
            Neighbouring weights of a row that share row scales; the last group of a row may be shorter.
    """

    signs: Tensor
    row_scale: Tensor
    column_scale: Tensor
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.signs.shape[1:]

    @property
    def bits(self) -> int:
        return len(self.signs)

    def planes(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the sum of the planes `(out_features, in_features)`, without the column scales."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.signs.device)
        scales, first = self.row_scale.float(), 0
        for start, groups, length in sections(self.shape[1], self.group_size):
            columns = slice(start, start + groups * length)
            signs = self.signs[:, :, columns].unflatten(-1, (groups, length))
            parts = scales[:, first : first + groups].unsqueeze(-2).unbind(-1)
            total = cast(Tensor, sum(part * sign for part, sign in zip(parts, signs, strict=True)))
            weight[:, columns] = total.flatten(1)
            first += groups
        return weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the matrix `(out_features, in_features)`, column scales included, computed in float32."""
        return (self.planes() * self.column_scale).to(dtype)


class Levels:
    """
    The levels of every row, and the nearest of them.

    Args:
        scales (`torch.Tensor`):
            Row scales `(..., K)`.
    """

    def __init__(self, scales: Tensor):
        # Summed in the order of the planes, as everything that reads them does.
        self.values, self.codes = _sum_planes(scales, _signs(scales)).sort(-1)
        self.middles = (self.values[..., 1:] + self.values[..., :-1]) / 2

    def nearest(self, weights: Tensor) -> Tensor:
        """Returns places in `values` for weights `(..., G)` that are divided by their column scales, int64."""
        place = torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
        for middle in self.middles.split(1, -1):
            place += weights >= middle
        return place


@cache
def _table(planes: int) -> Tensor:
    return torch.tensor([[2 * (code >> plane & 1) - 1 for code in range(2**planes)] for plane in range(planes)])


def _signs(like: Tensor) -> Tensor:
    return _table(like.shape[-1]).to(like)


def signs_of(codes: Tensor, planes: int) -> Tensor:
    """Returns the planes of codes whose bit k says whether plane k is positive, int8 `(planes, ...)`."""
    return torch.stack([2 * (codes >> plane & 1).to(torch.int8) - 1 for plane in range(planes)])


def fit_dsq(block: Tensor, planes: int, iters: int = 15, weights: Tensor | None = None) -> DualScale:
    """
    Fits row scales, column scales and signs to a block of one quantization group.

    Args:
        block (`torch.Tensor`):
            Weights `(N, G)`, or any number of independent blocks `(..., N, G)`. Computed in at least float32.
        planes (`int`):
            Planes: 2 for 2 bits, 3 for 3 bits; 1 is the binary case.
        iters (`int`, *optional*, defaults to `15`):
            Rounds of the three half-steps.
        weights (`torch.Tensor`, *optional*):
            Positive weights of the columns in the squared error, `(G,)`; without them all count alike, as in the
            paper.

    Returns:
        [`DualScale`]: Column scales as they come out; nothing is normalised or rounded.

    Raises:
        ValueError: Another number of planes.
    """
    _check_planes(planes)
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    columns, rows, signs = _start(block, planes, weights)
    objective = [_error(block, columns, rows, signs, weights)]
    for _ in range(iters):
        rows, signs = _fit_rows(block, columns, rows, signs, weights)
        objective.append(_error(block, columns, rows, signs, weights))
        columns, signs = _fit_columns(block, rows, signs)
        objective.append(_error(block, columns, rows, signs, weights))
        levels = Levels(rows)
        codes = levels.codes.gather(-1, levels.nearest(block / columns.unsqueeze(-2)))
        signs = signs_of(codes, planes).to(block.dtype)
        objective.append(_error(block, columns, rows, signs, weights))
    return DualScale(rows, columns, signs.to(torch.int8), objective)


def _check_planes(planes: int) -> None:
    if planes not in (1, 2, 3):
        raise ValueError(f"Dual scales have 1, 2 or 3 planes, one for each bit; got {planes}.")


def _first_columns(block: Tensor) -> Tensor:
    return block.abs().mean(-2).clamp_(min=SMALLEST_COLUMN)


def _weighted(columns: Tensor, weights: Tensor | None) -> Tensor:
    return columns if weights is None else columns * weights


def _start(block: Tensor, planes: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    columns = _first_columns(block)
    weighted = _weighted(columns, weights)
    norm, rest, rows, signs = (columns * weighted).sum(-1, keepdim=True), block, [], []
    for _ in range(planes):
        sign = torch.where(rest >= 0, 1.0, -1.0).to(block.dtype)
        scale = ((rest * sign) @ weighted.unsqueeze(-1)).squeeze(-1).abs() / norm
        rest = rest - scale.unsqueeze(-1) * columns.unsqueeze(-2) * sign
        rows.append(scale)
        signs.append(sign)
    return columns, torch.stack(rows, -1), torch.stack(signs)


def _fit_rows(
    block: Tensor, columns: Tensor, rows: Tensor, signs: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    planes, weighted = len(signs), _weighted(columns, weights).unsqueeze(-1)
    squares = columns.unsqueeze(-1) * weighted
    norm = squares.sum(-2, keepdim=True)
    matrix = torch.eye(planes, dtype=block.dtype, device=block.device).expand(*rows.shape, planes).clone()
    for k in range(planes):
        for other in range(k):
            product = (signs[k] * signs[other]) @ squares
            matrix[..., k, other] = matrix[..., other, k] = (product / norm).squeeze(-1)
    target = torch.cat([(block * sign) @ weighted for sign in signs], -1) / norm
    factor, _ = torch.linalg.cholesky_ex(matrix)
    independent = (factor.diagonal(dim1=-2, dim2=-1) > DEPENDENT).all(-1, keepdim=True)
    factor = torch.where(independent.unsqueeze(-1), factor, torch.eye(planes).to(factor))
    solved = torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1)
    rows = torch.where(independent, solved, rows)
    flips = torch.where(rows < 0, -1.0, 1.0).to(block.dtype)
    return rows.abs(), signs * flips.movedim(-1, 0).unsqueeze(-1)


def _fit_columns(block: Tensor, rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    total = _sum_planes(rows, signs)
    columns = (block * total).sum(-2) / total.square().sum(-2).clamp_(min=torch.finfo(block.dtype).tiny)
    flips = torch.where(columns < 0, -1.0, 1.0).to(block.dtype)
    return columns.abs().clamp_(min=SMALLEST_COLUMN), signs * flips.unsqueeze(-2)


def _sum_planes(rows: Tensor, signs: Tensor) -> Tensor:
    return cast(Tensor, sum(row * sign for row, sign in zip(rows.split(1, -1), signs, strict=True)))


def _error(block: Tensor, columns: Tensor, rows: Tensor, signs: Tensor, weights: Tensor | None) -> float:
    difference = _sum_planes(rows, signs).mul_(columns.unsqueeze(-2)).sub_(block)
    if weights is not None:
        difference *= weights.sqrt()
    return difference.flatten().dot(difference.flatten()).item()


def fit_levels(block: Tensor, planes: int, iters: int = 15, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Returns the scales of a block as they are stored: column scales of geometric mean 1 or 0, row scales rounded.

    Takes the arguments of [`fit_dsq`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Row scales, float16 `(..., N, K)`; column scales, float32 `(..., G)`.
    """
    _check_planes(planes)
    block = block.contiguous()  # sums are taken in one order, whatever the layout was
    if block.ndim == 2 and (solver := native.solver(block)):
        first = _first_columns(block)
        rows, columns = solver.fit_dual(block.T, first, planes, iters, weights, DEPENDENT, SMALLEST_COLUMN)
    else:
        rows, columns, *_ = fit_dsq(block, planes, iters, weights)
    live = columns > SMALLEST_COLUMN
    live |= ~live.any(-1, keepdim=True)
    factor = (columns.log().mul_(live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True)).exp()
    return (rows * factor.unsqueeze(-1)).half(), (columns / factor).masked_fill_(~live, 0).float()


def round_to_nearest(weight: Tensor, planes: int, group_size: int = 128, iters: int = 15) -> DualCodes:
    """
    Quantizes a matrix to sign planes with dual scales, without calibration data.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(out_features, in_features)`, any floating type.
        planes (`int`):
            Planes, one bit a weight each: 2 or 3.
        group_size (`int`, *optional*, defaults to `128`):
            Neighbours in a row that share row scales. A shorter last group is fitted on its true length.
        iters (`int`, *optional*, defaults to `15`):
            Rounds of the fit.

    Returns:
        [`DualCodes`]

    Raises:
        ValueError: The weight is not a floating matrix, or has a value that is no number or too large for float16
            scales; or `planes` is not 1, 2 or 3.
    """
    weight = check_weight(weight)
    signs = torch.empty(planes, *weight.shape, dtype=torch.int8, device=weight.device)
    row_scales, column_scales = [], []
    for start, count, length in sections(weight.shape[1], group_size):
        for first in range(start, start + count * length, length):
            columns = slice(first, first + length)
            block = weight[:, columns]
            row_scale, column_scale = fit_levels(block, planes, iters)
            levels = Levels(row_scale.to(weight.dtype))
            signs[:, :, columns] = signs_of(levels.codes.gather(-1, levels.nearest(block / column_scale)), planes)
            row_scales.append(row_scale)
            column_scales.append(column_scale)
    return DualCodes(signs, torch.stack(row_scales, 1), torch.cat(column_scales), group_size)
