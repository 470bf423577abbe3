r"""Affine grids: 2^b equally spaced levels for every group of neighbouring weights of a row.

    w  ~  s q + l,    q in {0, ..., 2^b - 1},    l = -s z,    z in {0, ..., 2^b - 1}

The step s is stored in float16 and the zero point z as an integer; the kernels read s and l, both in float16
(`hf_rb/quantizers/kernels/layout.py`). The levels that are searched here are those of the rounded numbers, so that
what is minimised is what is deployed.

The range of a grid always holds zero. It ends at the smallest and the largest weight, or, with a clip search, at the
share of both among 1, 0.99, ..., 0.21 that leaves the smallest sum of |w - level|^2.4. This is the base quantizer of
https://huggingface.co/papers/2602.02546, as in its released code.

This file is the reference, in torch, for any device and type. `solver.c` has the clip search for float32 in main
memory.

Shapes: a row is a group of G weights; `(..., G)` are any number of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_rb.quantizers.d2quant.maths import native
from hf_rb.quantizers.kernels.layout import sections


__all__ = ["AffineCodes", "Grid", "Rounder", "check_weight", "fit_grid", "round_to_nearest"]

CLIP_STEPS, CLIP_GRID, CLIP_NORM = 80, 100, 2.4
# Weights that the clip search looks at together: few enough to stay in the cache while it tries its 80 shares.
CHUNK = 1 << 16


@dataclass
class AffineCodes:
    """
    A matrix on affine grids.

    Args:
        codes (`torch.Tensor`):
            uint8 `(out_features, in_features)`, from 0 to `2**bits - 1`.
        scale (`torch.Tensor`):
            Steps, float16 `(out_features, groups)`.
        zero (`torch.Tensor`):
            Codes of the value zero, uint8 `(out_features, groups)`.
        bits (`int`):
            2, 3 or 4.
        group_size (`int`):
            Neighbouring weights of a row that share a grid; the last group of a row may be shorter.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def lowest(self) -> Tensor:
        """Level of the code 0 as the kernels have it, float16 `(out_features, groups)`."""
        return _lowest(self.scale, self.zero)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the matrix `(out_features, in_features)`, computed in float32."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        step, lowest, first = self.scale.float(), self.lowest.float(), 0
        for start, groups, length in sections(self.shape[1], self.group_size):
            columns, grids = slice(start, start + groups * length), slice(first, first + groups)
            codes = self.codes[:, columns].unflatten(-1, (groups, length))
            weight[:, columns] = (codes * step[:, grids, None] + lowest[:, grids, None]).flatten(1)
            first += groups
        return weight


class Grid(NamedTuple):
    """
    The levels of groups of weights.

    Attributes:
        scale (`torch.Tensor`): float16 `(...)`.
        zero (`torch.Tensor`): uint8 `(...)`.
        bits (`int`): Bits of a code.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def between(cls, low: Tensor, high: Tensor, bits: int) -> "Grid":
        """Returns the grids from `low` to `high`, which have zero between them."""
        scale = ((high - low) / (2**bits - 1)).half()
        step = scale.to(low.dtype)
        zero = torch.where(step > 0, -low / step, 0).round_().clamp_(0, 2**bits - 1)
        return cls(scale, zero.to(torch.uint8), bits)

    def rounder(self, dtype: torch.dtype = torch.float32) -> "Rounder":
        """Returns the grids as numbers to compute with."""
        step, lowest = self.scale.to(dtype), _lowest(self.scale, self.zero).to(dtype)
        return Rounder(step, lowest, torch.where(step > 0, 1 / step, 0), 2**self.bits - 1)


class Rounder(NamedTuple):
    """Finds nearest levels. A grid of step 0, that of weights which are all zero, has the code 0."""

    step: Tensor
    lowest: Tensor
    inverse: Tensor
    last: int

    def encode(self, weights: Tensor) -> Tensor:
        """Returns the codes of the nearest levels, in the type of the weights."""
        return ((weights - self.lowest) * self.inverse).round_().clamp_(0, self.last)

    def decode(self, codes: Tensor) -> Tensor:
        return codes * self.step + self.lowest


def _lowest(scale: Tensor, zero: Tensor) -> Tensor:
    return -(scale.float() * zero).half()


def fit_grid(groups: Tensor, bits: int, clip_search: bool = True) -> Grid:
    """
    Returns the grid of every group of weights.

    Args:
        groups (`torch.Tensor`):
            Weights `(..., G)`, float32 or float64.
        bits (`int`):
            Bits of a code.
        clip_search (`bool`, *optional*, defaults to `True`):
            Whether the range is the best of 80 shares of that of the weights.
    """
    if not clip_search:
        return Grid.between(*_range(groups), bits)
    rows, shape = groups.reshape(-1, groups.shape[-1]), groups.shape[:-1]
    if solver := native.solver(rows):
        step, zero = solver.fit_grids(rows.T, bits, CLIP_STEPS)
        return Grid(step.half().view(shape), zero.to(torch.uint8).view(shape), bits)
    parts = [_search_clip(part, bits) for part in rows.split(max(1, CHUNK // rows.shape[-1]))]
    scale, zero = (torch.cat(column).view(shape) for column in zip(*parts, strict=True))
    return Grid(scale, zero, bits)


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.amin(-1).clamp_(max=0), rows.amax(-1).clamp_(min=0)


def _search_clip(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = _range(rows)
    shares = 1 - torch.arange(CLIP_STEPS, dtype=rows.dtype, device=rows.device)[:, None] / CLIP_GRID
    grids = Grid.between(shares * low, shares * high, bits)
    rounder = grids.rounder(rows.dtype)
    errors = torch.empty(CLIP_STEPS, len(rows), dtype=rows.dtype, device=rows.device)
    for share in range(CLIP_STEPS):
        step, lowest, inverse = (numbers[share, :, None] for numbers in rounder[:3])
        tried = Rounder(step, lowest, inverse, rounder.last)
        torch.sum((tried.decode(tried.encode(rows)) - rows).abs_().pow_(CLIP_NORM), -1, out=errors[share])
    best = errors.argmin(0, keepdim=True)  # the first of equal ones: the widest range
    return grids.scale.gather(0, best)[0], grids.zero.gather(0, best)[0]


def round_to_nearest(weight: Tensor, bits: int, group_size: int = 128, clip_search: bool = True) -> AffineCodes:
    """
    Rounds a matrix to affine grids, without calibration data.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(out_features, in_features)`, any floating type.
        bits (`int`):
            Bits of a code: 2, 3 or 4.
        group_size (`int`, *optional*, defaults to `128`):
            Neighbours in a row that share a grid. A shorter last group gets a grid of its own.
        clip_search (`bool`, *optional*, defaults to `True`):
            Whether the range of a grid is searched.

    Returns:
        [`AffineCodes`]

    Raises:
        ValueError: The weight is not a floating matrix, or has a value that is no number or too large for float16
            scales.
    """
    weight = check_weight(weight)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start, count, length in sections(weight.shape[1], group_size):
        columns = slice(start, start + count * length)
        groups = weight[:, columns].unflatten(-1, (count, length))
        grid = fit_grid(groups, bits, clip_search)
        rounder = Grid(grid.scale[..., None], grid.zero[..., None], bits).rounder(weight.dtype)
        codes[:, columns] = rounder.encode(groups).flatten(1)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    return AffineCodes(codes, torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def check_weight(weight: Tensor) -> Tensor:
    """Returns a matrix in at least float32, or raises a `ValueError` that says why float16 scales cannot hold it."""
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"Expected a non-empty floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}.")
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = weight.abs().max()
    if not largest.isfinite():
        raise ValueError("The weight has a NaN or an infinite value.")
    if largest > torch.finfo(torch.float16).max / 2:  # a range has two ends
        raise ValueError(f"The weight has a value of {largest:.3g}, too large for scales in float16.")
    return weight
