"""Rounds the columns of a group one by one, for GPTQ and GPTAQ (`gptq.py`): to affine grids, or to levels of dual
scales.

Matrices are transposed, `(in_features, out_features)`: a column of the weight is a row of memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_rb.quantizers.d2quant.maths import native
from hf_rb.quantizers.d2quant.maths.dsq import DualCodes, Levels, fit_levels, signs_of
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes, Rounder, fit_grid


__all__ = ["AffineColumns", "AffineMatrix", "DualColumns", "DualMatrix", "round_columns"]


class AffineColumns(NamedTuple):
    """Columns that are rounded to affine grids."""

    rounder: Rounder

    def nearest(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.rounder.encode(weights)
        return codes, self.rounder.decode(codes)

    def rounding(self) -> dict[str, Tensor | int]:
        return {"levels": 0, **self.rounder._asdict()}


class DualColumns(NamedTuple):
    """Columns that are rounded to the levels of dual scales."""

    levels: Levels
    scale: Tensor

    def nearest(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        place = self.levels.nearest((weights / self.scale[column]).unsqueeze(-1))
        codes, values = (table.gather(-1, place).squeeze(-1) for table in (self.levels.codes, self.levels.values))
        return codes, values * self.scale[column]

    def rounding(self) -> dict[str, Tensor | int]:
        tables = {"value": self.levels.values.T, "code": self.levels.codes.T.float(), "middle": self.levels.middles.T}
        return {"levels": len(tables["value"]), "column": self.scale, **tables}


def round_columns(
    columns: AffineColumns | DualColumns, block: Tensor, factor: Tensor, residual: Tensor | None, codes: Tensor
) -> Tensor:
    """
    Quantizes the columns of a group. Fills in `codes`; `block` `(G, out)` then holds every column as it was when its
    turn came.

    Returns:
        `torch.Tensor`: What the columns that follow have to make up for, `(G, out)`.
    """
    if solver := native.solver(block):
        return solver.round_columns(block, columns.rounding(), factor, residual, codes)
    errors, steps = torch.empty_like(block), factor.diagonal().tolist()
    for column, (weights, error) in enumerate(zip(block, errors, strict=True)):
        codes[column], values = columns.nearest(column, weights)
        torch.sub(weights, values, out=error).div_(steps[column])
        later = slice(column + 1, None)
        block[later].addr_(factor[column, later], error, alpha=-1)
        if residual is not None:
            block[later].addr_(residual[column, later], weights)
    return errors


class AffineMatrix:
    """Gathers the grids of groups and the codes of columns in the order in which they are found."""

    def __init__(self, rest: Tensor, group_size: int, bits: int, clip_search: bool):
        self.codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
        groups = -(-len(rest) // group_size)
        self.scale = torch.empty(rest.shape[1], groups, dtype=torch.float16, device=rest.device)
        self.zero = torch.empty(rest.shape[1], groups, dtype=torch.uint8, device=rest.device)
        self.group_size, self.bits, self.clip_search = group_size, bits, clip_search

    def fit(self, group: int, place: slice, block: Tensor) -> AffineColumns:
        grid = fit_grid(block.T, self.bits, self.clip_search)
        self.scale[:, group], self.zero[:, group] = grid.scale, grid.zero
        return AffineColumns(grid.rounder())

    def finish(self, order: Tensor) -> AffineCodes:
        codes = _restore(self.codes, order).T.contiguous()
        return AffineCodes(codes, self.scale, self.zero, self.bits, self.group_size)


class DualMatrix:
    """Columns of a matrix with dual scales, rounded group by group as [`AffineMatrix`] does."""

    def __init__(self, rest: Tensor, group_size: int, planes: int, iters: int, dead: Tensor, weights: Tensor | None):
        self.codes = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
        groups = -(-len(rest) // group_size)
        self.row_scale = torch.empty(rest.shape[1], groups, planes, dtype=torch.float16, device=rest.device)
        self.column_scale = torch.empty(len(rest), dtype=torch.float32, device=rest.device)
        self.group_size, self.planes, self.iters, self.dead, self.weights = group_size, planes, iters, dead, weights

    def fit(self, group: int, place: slice, block: Tensor) -> DualColumns:
        weights = None if self.weights is None else self.weights[place] / self.weights[place].amax()
        rows, columns = fit_levels(block.T, self.planes, self.iters, weights)
        columns = columns.masked_fill(self.dead[place], 0)
        self.row_scale[:, group], self.column_scale[place] = rows, columns
        return DualColumns(Levels(rows.float()), columns)

    def finish(self, order: Tensor) -> DualCodes:
        signs = signs_of(_restore(self.codes, order).T.contiguous(), self.planes)
        return DualCodes(signs, self.row_scale, _restore(self.column_scale, order), self.group_size)


def _restore(found: Tensor, order: Tensor) -> Tensor:
    """Puts what was found for every column where the column is in the matrix."""
    return torch.empty_like(found).index_copy_(0, order, found)
