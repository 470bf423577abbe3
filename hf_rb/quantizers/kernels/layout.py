r"""Layout of a quantized matrix for the kernels: codes of a few bits, and small tables that turn a code into a number.

A weight of row i and column j, in group g, is

    w[i, j] = sum over parts p, sum over k   scale[i, g, k] * basis_p[k][code_p[i, j]]

A *part* is one code of 4, 2 or 1 bits a weight with the rows of its basis; parts take their scales one after the
other. Two trit-planes are one part of 4 bits with the basis ((-1, -1, -1, 0, ...), (-1, 0, 1, -1, ...)); an affine
grid is a part with the basis ((0, 1, 2, 3), (1, 1, 1, 1)) and the scales (step, lowest value).

In memory every group starts on its own byte, its parts one after the other. A part of b bits keeps m = 8 / b codes in
a byte: byte j of n codes holds the codes j, j + q, j + 2q, ... with q = ceil(n / m), lowest bits first. One shift of
neighbouring bytes then gives neighbouring weights. A short last group is laid out by its own length.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


__all__ = ["Layout", "Part", "pack", "sections", "unpack"]


def sections(in_features: int, group_size: int) -> list[tuple[int, int, int]]:
    """Cuts a row into its full groups and its short last group: `(first weight, groups, group length)` of each
    part.
    """
    full, rest = divmod(in_features, group_size)
    parts = [(0, full, group_size), (full * group_size, 1, rest)]
    return [(start, groups, length) for start, groups, length in parts if groups and length]


@dataclass(frozen=True)
class Part:
    """
    One code a weight.

    Args:
        bits (`int`):
            4, 2 or 1.
        basis (`tuple[tuple[int, ...], ...]`):
            A row for each scale, of integers from -63 to 63: what a code is multiplied with. A row is as long as there
            are codes in use, at most `2**bits`; the others mean zero.
    """

    bits: int
    basis: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        lengths = {len(row) for row in self.basis}
        if self.bits not in (1, 2, 4) or len(lengths) != 1 or not 0 < max(lengths) <= 2**self.bits:
            raise ValueError(
                "A part has codes of 1, 2 or 4 bits, and up to `2**bits` integers in every row of its basis; got "
                f"bits={self.bits}, basis={self.basis}."
            )
        if any(abs(value) > 63 for row in self.basis for value in row):
            raise ValueError(f"The integers of a basis lie between -63 and 63; got {self.basis}.")

    @property
    def padding(self) -> int:
        """The code of places without a weight: the first one that means zero."""
        zero = [code for code, column in enumerate(zip(*self.basis, strict=True)) if not any(column)]
        return zero[0] if zero else 0

    def bytes(self, length: int) -> int:
        """Bytes that a group of `length` weights takes."""
        return -(-length * self.bits // 8)


@dataclass(frozen=True)
class Layout:
    """
    The bytes of a row.

    Args:
        in_features (`int`):
            Weights of a row.
        group_size (`int`):
            Neighbouring weights that share their scales; the last group may be shorter.
        parts (`tuple[Part, ...]`):
            The codes of a group, in the order of their bytes and of their scales.

    Attributes:
        row_bytes (`int`): Bytes of a packed row.
        groups (`int`): Groups of a row.
        num_scales (`int`): Scales of a group.
        key (`str`): The layout as text; [`~Layout.from_key`] reads it.
    """

    in_features: int
    group_size: int
    parts: tuple[Part, ...]
    row_bytes: int = field(init=False, compare=False, repr=False)
    groups: int = field(init=False, compare=False, repr=False)
    num_scales: int = field(init=False, compare=False, repr=False)
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        # Attributes rather than properties: a traced forward pass finds constants.
        derived = {
            "row_bytes": sum(groups * self.group_bytes(length) for _, groups, length in self.sections()),
            "groups": -(-self.in_features // self.group_size),
            "num_scales": sum(len(part.basis) for part in self.parts),
            "key": json.dumps([self.in_features, self.group_size, [[part.bits, part.basis] for part in self.parts]]),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @staticmethod
    @cache
    def from_key(key: str) -> "Layout":
        in_features, group_size, parts = json.loads(key)
        return Layout(in_features, group_size, tuple(Part(bits, tuple(map(tuple, basis))) for bits, basis in parts))

    def sections(self) -> list[tuple[int, int, int]]:
        """`(first weight, groups, group length)` of the full groups and of the short last one."""
        return sections(self.in_features, self.group_size)

    def group_bytes(self, length: int) -> int:
        """Bytes of a group of `length` weights, all parts."""
        return sum(part.bytes(length) for part in self.parts)


def pack(codes: list[Tensor], layout: Layout) -> Tensor:
    """Packs the codes of every part, uint8 `(out_features, in_features)` each, into uint8
    `(out_features, row_bytes)`.
    """
    packed = []
    for start, groups, length in layout.sections():
        blocks: list[Any] = []
        for part, code in zip(layout.parts, codes, strict=True):
            block = code[:, start : start + groups * length].unflatten(-1, (groups, length))
            block = F.pad(block, (0, part.bytes(length) * 8 // part.bits - length), value=part.padding)
            columns = block.chunk(8 // part.bits, dim=-1)
            blocks.append(sum(column << (i * part.bits) for i, column in enumerate(columns)))
        packed.append(torch.cat(blocks, dim=-1).flatten(1))
    return torch.cat(packed, dim=-1)


def unpack(weight: Tensor, layout: Layout) -> list[Tensor]:
    """Inverse of [`pack`]."""
    codes, first = [[] for _ in layout.parts], 0
    for _, groups, length in layout.sections():
        block = weight[:, first : first + groups * layout.group_bytes(length)].unflatten(-1, (groups, -1))
        first += block.shape[1] * block.shape[2]
        pieces = block.split([part.bytes(length) for part in layout.parts], dim=-1)
        for part, piece, found in zip(layout.parts, pieces, codes, strict=True):
            shifts = range(0, 8, part.bits)
            whole = torch.cat([(piece >> shift) & (2**part.bits - 1) for shift in shifts], dim=-1)
            found.append(whole[..., :length].flatten(1))
    return [torch.cat(found, dim=-1) for found in codes]
