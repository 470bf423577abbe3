r"""Storage of D²Quant's weights, in files and for the kernels.

There are two kinds of matrices, each with codes of 2 or 3 bits, the first also of 4:

- affine: w = step * code + lowest, with lowest = -step * zero in float16;
- dual (DSQ): w = column * sum_k scale_k * sign_k, bit k of a code says whether sign k is positive.

File, for a matrix with N rows, K columns and groups of G (g = ceil(K / G)), with uint8 codes in the kernels' order:
every group starts at a byte of its own, byte j of n codes of b bits holds the codes j, j + q, ..., with
q = ceil(n b / 8), lowest bits first (`hf_rb/quantizers/kernels/layout.py`).

    weight          the codes at 2 and 4 bits; at 3 bits their lower two bits
    weight_hi       3 bits only: the third bits
    weight_scale    float16: steps (N, g), or the scales of the planes (N, g, planes)
    weight_zero     affine only, uint8 (N, ceil(g b / 8)): zero point i in the bits i b to i b + b - 1 of its row
    weight_column   float32 (K,): column scales, dual only, and only where they are not in the scales of another matrix

In memory the bytes are those of the file, at 3 bits both parts of a group one after the other, and the scales are
those that the kernels multiply with: of an affine matrix (step, lowest), at 3 bits (step, lowest, step), whose last is
for the third bit.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rb.quantizers.d2quant.maths.dsq import DualCodes
from hf_rb.quantizers.d2quant.maths.grids import AffineCodes
from hf_rb.quantizers.kernels import layout as kernel_layout
from hf_rb.quantizers.kernels.layout import Layout, Part
from hf_rb.quantizers.packed.weight import DamagedTensor, PackedWeight


__all__ = [
    "Coding",
    "code_bits",
    "for_kernels",
    "from_file",
    "grids_of",
    "is_dual",
    "layout_of",
    "scale_rows",
    "to_file",
]

ONES = (1, 1, 1, 1)
AFFINE = {
    2: (Part(2, (tuple(range(4)), ONES)),),
    3: (Part(2, (tuple(range(4)), ONES)), Part(1, ((0, 4),))),
    4: (Part(4, (tuple(range(16)), 4 * ONES)),),
}
SIGNS = Part(2, ((-1, 1, -1, 1), (-1, -1, 1, 1)))
DUAL = {2: (SIGNS,), 3: (SIGNS, Part(1, ((-1, 1),)))}


class Coding(NamedTuple):
    """
    Coding of a weight.

    Attributes:
        bits (`int`): Bits of a code.
        dual (`bool`): Whether the levels are those of sign planes with dual scales instead of grids.
    """

    bits: int
    dual: bool


@cache
def layout_of(in_features: int, group_size: int, bits: int, dual: bool = False) -> Layout:
    """Returns the kernels' layout of a matrix with `in_features` columns."""
    return Layout(in_features, group_size, (DUAL if dual else AFFINE)[bits])


def code_bits(layout: Layout) -> int:
    """Returns the bits of a code."""
    return sum(part.bits for part in layout.parts)


def is_dual(layout: Layout) -> bool:
    """Returns whether a layout is that of sign planes."""
    return layout.parts[0] == SIGNS


def for_kernels(codes: AffineCodes | DualCodes) -> PackedWeight:
    """Returns what a layer holds of a quantized matrix."""
    dual = isinstance(codes, DualCodes)
    layout = layout_of(codes.shape[1], codes.group_size, codes.bits, dual)
    if dual:
        planes = ((codes.signs[plane] > 0).to(torch.uint8) << plane for plane in range(codes.bits))
        numbers = cast(Tensor, sum(planes))
        scale, column = codes.row_scale, codes.column_scale
    else:
        numbers, scale, column = codes.codes, _scales(codes.scale, codes.zero, codes.bits), None
    parts = [numbers] if codes.bits != 3 else [numbers & 3, numbers >> 2]
    return PackedWeight(kernel_layout.pack(parts, layout), scale, column)


def _scales(step: Tensor, zero: Tensor, bits: int) -> Tensor:
    lowest = -(step.float() * zero).half()
    return torch.stack([step, lowest, step] if bits == 3 else [step, lowest], -1)


def grids_of(scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns steps and zero points of the scales in memory."""
    # Rounding to float16 moves a lowest value by less than 1/100 of a step.
    step, lowest = scale[..., 0], scale[..., 1].float()
    zero = torch.where(step > 0, -lowest / step.float(), 0).round_().clamp_(0, 2**bits - 1)
    return step.contiguous(), zero.to(torch.uint8)


def scale_rows(layout: Layout, scale: Tensor, factor: Tensor) -> Tensor:
    """
    Returns the scales of an affine matrix whose rows are multiplied with factors, none of them negative; codes stay,
    and so do zero points but where the factor is 0.

    Args:
        layout ([`~hf_rb.quantizers.kernels.layout.Layout`]):
            That of the matrix.
        scale (`torch.Tensor`):
            float16 `(..., rows, groups, scales)`, in the form of memory.
        factor (`torch.Tensor`):
            float32 `(..., rows)`.

    Raises:
        ValueError: A product is too large or too small for float16.
    """
    bits = code_bits(layout)
    step, zero = grids_of(scale, bits)
    product = step.float() * factor[..., None]
    result = _scales(product.half(), zero, bits)
    if not result.isfinite().all() or ((result[..., 0].float() - product).abs() > product / 512).any():
        raise ValueError("A scale times its factor is out of the range of float16.")
    return result


# Files and memory have the same leading dimensions, those of experts.


def to_file(layout: Layout, weight: PackedWeight) -> PackedWeight:
    """Returns what a file holds of a weight in memory."""
    stored, bits = replace(weight), code_bits(layout)
    if bits == 3:
        stored.packed, stored.hi = _apart(weight.packed, layout)
    if not is_dual(layout):
        stored.scale, zero = grids_of(weight.scale, bits)
        stored.zero = _pack_zeros(zero, bits)
    return stored


def from_file(layout: Layout, stored: PackedWeight, column: bool = False) -> PackedWeight:
    """
    Inverse of [`to_file`], which checks every tensor.

    Args:
        layout ([`~hf_rb.quantizers.kernels.layout.Layout`]):
            That of the matrix.
        stored ([`~hf_rb.quantizers.packed.weight.PackedWeight`]):
            The tensors of the file.
        column (`bool`, *optional*, defaults to `False`):
            Whether there are to be column scales.

    Raises:
        DamagedTensor: A tensor is missing or too many, has another type or shape, or a scale that is none.
    """
    kind = f"{code_bits(layout)}-bit {'sign planes' if is_dual(layout) else 'grids'}"
    stored.check(kind, **_expected(layout, stored.packed.shape[:-1], column))
    weight = PackedWeight(stored.packed, stored.scale, stored.column)
    if stored.hi is not None:
        weight.packed = _together(stored.packed, stored.hi, layout)
    if stored.zero is not None:
        bits = code_bits(layout)
        weight.scale = _scales(stored.scale, _unpack_zeros(stored.zero, bits, layout.groups), bits)
        if not weight.scale.isfinite().all():
            raise DamagedTensor("A scale times its zero point is too large for float16: the file is damaged.", "scale")
    return weight


def _expected(layout: Layout, rows: tuple[int, ...], column: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns type and shape of the tensors of a file."""
    bits, widths = code_bits(layout), [_row_bytes(layout, part) for part in layout.parts]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"packed": (torch.uint8, (*rows, widths[0]))}
    if bits == 3:
        expected["hi"] = torch.uint8, (*rows, widths[1])
    if is_dual(layout):
        expected["scale"] = torch.float16, (*rows, layout.groups, bits)
    else:
        expected["scale"] = torch.float16, (*rows, layout.groups)
        expected["zero"] = torch.uint8, (*rows, -(-layout.groups * bits // 8))
    if column:
        expected["column"] = torch.float32, (*rows[:-1], layout.in_features)
    return expected


def _row_bytes(layout: Layout, part: Part) -> int:
    return sum(groups * part.bytes(length) for _, groups, length in layout.sections())


def _apart(packed: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    pieces, first = [], 0
    for _, groups, length in layout.sections():
        block = packed[..., first : first + groups * layout.group_bytes(length)].unflatten(-1, (groups, -1))
        first += block.shape[-2] * block.shape[-1]
        split = block.split([part.bytes(length) for part in layout.parts], dim=-1)
        pieces.append([piece.flatten(-2) for piece in split])
    return tuple(torch.cat(part, -1) for part in zip(*pieces, strict=True))


def _together(low: Tensor, high: Tensor, layout: Layout) -> Tensor:
    blocks, first = [], [0, 0]
    for _, groups, length in layout.sections():
        pieces = []
        for i, (rows, part) in enumerate(zip((low, high), layout.parts, strict=True)):
            count = groups * part.bytes(length)
            pieces.append(rows[..., first[i] : first[i] + count].unflatten(-1, (groups, -1)))
            first[i] += count
        blocks.append(torch.cat(pieces, -1).flatten(-2))
    return torch.cat(blocks, -1)


def _pack_zeros(zero: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits, dtype=torch.uint8, device=zero.device)
    stream = (zero[..., None] >> places & 1).flatten(-2)
    stream = F.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=zero.device)).sum(-1, dtype=torch.uint8)


def _unpack_zeros(packed: Tensor, bits: int, groups: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed[..., None] >> places & 1).flatten(-2)[..., : groups * bits].unflatten(-1, (groups, bits))
    return (stream << places[:bits]).sum(-1, dtype=torch.uint8)
