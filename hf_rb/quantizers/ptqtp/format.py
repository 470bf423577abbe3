"""Trit-planes and their two byte layouts.

A weight of group g in row i is  w = sum_k scales[i, g, k] * trits[k, i, j]  with trits in {-1, 0, 1}. Every group
starts at a byte of its own in both layouts, so a tensor can be cut at any multiple of `group_size`:

- `"dense"`: five trits of one plane a byte, as the base-3 number of their digits `trit + 1`, first trit most
  significant (0 to 242). A group stores its planes one after the other: 26 bytes a plane for 128 weights, 1.625 bits a
  weight.
- `"nibble"`: what the kernels read (`hf_rb/quantizers/kernels/layout.py`). Planes 0 and 1 share codes of four bits,
  the base-3 number of their two digits (0 to 8): byte j of a group of length n holds code j in its low half and code
  j + ceil(n / 2) in its high half. A plane that is left over (plane 0 of one, plane 2 of three) follows as digits of
  two bits (0 to 2): byte j holds digits j, j + q, j + 2q and j + 3q with q = ceil(n / 4), from the low bits up. A
  group of 128 takes 32, 64 or 96 bytes for 1, 2 or 3 planes.

A group shorter than `group_size`, the last of a row, is laid out by its own length. Unused places hold zero trits.

In memory a layer always has the second; `config.packing` is the layout in the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout, Part, pack, sections, unpack


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.config import PTQTPConfig

__all__ = [
    "TritPlanes",
    "layout_of",
    "packed_width",
    "repack",
    "row_blocks",
]

MAX_PLANES = 3
TRITS_PER_BYTE = 5

NIBBLE = Part(bits=4, basis=(tuple(code // 3 - 1 for code in range(9)), tuple(code % 3 - 1 for code in range(9))))
CRUMB = Part(bits=2, basis=((-1, 0, 1),))


@cache
def layout_of(in_features: int, group_size: int, planes: int) -> Layout:
    """Returns the kernels' layout of a matrix with `in_features` columns and 1, 2 or 3 planes."""
    return Layout(in_features, group_size, (NIBBLE,) * (planes // 2) + (CRUMB,) * (planes % 2))


def packed_width(in_features: int, group_size: int, planes: int, packing: str) -> int:
    """Returns the bytes that one packed row takes, without its scales."""
    layout = layout_of(in_features, group_size, planes)
    if packing == "nibble":
        return layout.row_bytes
    if packing == "dense":
        return sum(planes * groups * _dense_bytes(length) for _, groups, length in layout.sections())
    raise ValueError(f"packing must be 'dense' or 'nibble', got {packing!r}.")


def _width(layout: Layout, packing: str) -> int:
    return packed_width(layout.in_features, layout.group_size, layout.num_scales, packing)


def _dense_bytes(length: int) -> int:
    return -(-length // TRITS_PER_BYTE)


@dataclass
class TritPlanes:
    """
    A matrix as a sum of scaled ternary planes (see [`~hf_rb.quantizers.ptqtp.solve`]).

    Args:
        trits (`torch.Tensor`):
            int8, -1, 0 or 1, of shape `(planes, out_features, in_features)`.
        scales (`torch.Tensor`):
            Floating, of shape `(out_features, ceil(in_features / group_size), planes)`; in every group
            `scales[..., 0] >= scales[..., 1] >= 0`.
        group_size (`int`):
            Weights of a row that share their scales. The last group of a row may be shorter.
        resolved (`bool`, *optional*, defaults to `False`):
            Whether the absolute stopping rule was too coarse for this matrix and it was solved again with the relative
            one.
    """

    trits: Tensor
    scales: Tensor
    group_size: int
    resolved: bool = False

    @property
    def shape(self) -> torch.Size:
        """`(out_features, in_features)`."""
        return self.trits.shape[1:]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the matrix `(out_features, in_features)`, summed in float32 (or the wider type of the scales)."""
        scales = self.scales.to(torch.promote_types(self.scales.dtype, torch.float32))
        weight = torch.empty(self.shape, dtype=dtype, device=self.trits.device)
        first = 0
        for start, groups, length in sections(self.shape[1], self.group_size):
            columns = slice(start, start + groups * length)
            trits = self.trits[:, :, columns].unflatten(-1, (groups, length))
            parts = scales[:, first : first + groups]
            block = trits[0] * parts[..., 0, None]
            for plane in range(1, len(trits)):
                block += trits[plane] * parts[..., plane, None]
            weight[:, columns] = block.flatten(1)
            first += groups
        return weight

    def pack(self, packing: str = "dense") -> dict[str, Tensor]:
        """
        Returns the two tensors of file format v1.

        Args:
            packing (`str`, *optional*, defaults to `"dense"`):
                `"dense"` (26 bytes a plane and group of 128) or `"nibble"` (64 bytes a group of 128 with two planes).

        Returns:
            `dict[str, torch.Tensor]`: `weight`, uint8 `(out_features, packed_width(...))`, and `weight_scale`.
        """
        layout = layout_of(self.shape[1], self.group_size, len(self.trits))
        _width(layout, packing)  # refuses a packing that does not exist
        return {"weight": _pack((self.trits + 1).to(torch.uint8), layout, packing), "weight_scale": self.scales}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], config: "PTQTPConfig", in_features: int | None = None) -> "TritPlanes":
        """
        Inverse of [`~TritPlanes.pack`].

        Args:
            tensors (`dict[str, torch.Tensor]`):
                `weight` and `weight_scale` of one matrix. The scales' last dimension says how many planes there are.
            config ([`PTQTPConfig`]):
                Gives `group_size` and `packing`.
            in_features (`int`, *optional*):
                Columns of the matrix. By default every group is full; a matrix with a short last group needs this
                number, which its `nn.Linear` or the model's configuration knows.

        Raises:
            ValueError: The shapes do not belong together, or a byte is not a code of the layout.
        """
        packed, scales = tensors["weight"], tensors["weight_scale"]
        groups, planes = scales.shape[1:]
        if in_features is None:
            in_features = groups * config.group_size
        layout = layout_of(in_features, config.group_size, planes)
        width = packed_width(in_features, config.group_size, planes, config.packing)
        if packed.shape != (len(scales), width) or groups != layout.groups:
            raise ValueError(
                f"A packed weight of shape {tuple(packed.shape)} with scales {tuple(scales.shape)} is not a matrix "
                f"with {in_features} columns in groups of {config.group_size} ({config.packing}, {width} bytes a row "
                "expected). If the last group of a row is shorter than the others, pass `in_features`."
            )
        return cls(_unpack(packed, layout, config.packing).to(torch.int8) - 1, scales, config.group_size)


def row_blocks(rows: int, in_features: int) -> Iterator[slice]:
    """Cuts a matrix into rows of about a million weights, the most that is held in an unpacked form at a time."""
    step = max(1, (1 << 20) // in_features)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def repack(packed: Tensor, layout: Layout, source: str, target: str) -> Tensor:
    """
    Changes the byte layout of packed trits, a block of rows at a time, and checks every byte.

    Args:
        packed (`torch.Tensor`):
            uint8 `(..., bytes of a row)` in the layout `source`.
        layout ([`~hf_rb.quantizers.kernels.layout.Layout`]):
            That of the matrix, from [`layout_of`].
        source, target (`str`):
            `"dense"` or `"nibble"`.

    Returns:
        `torch.Tensor`: uint8 `(..., bytes of a row)`; the argument itself where the two layouts are the same.

    Raises:
        ValueError: The type or the number of bytes is not that of the layout, or a byte is none of its codes.
    """
    width = _width(layout, source)
    if packed.dtype != torch.uint8 or packed.shape[-1] != width:
        raise ValueError(
            f"Expected uint8 rows of {width} bytes ({layout.in_features} weights, {layout.num_scales} planes, "
            f"{source!r}), got {packed.dtype} of shape {tuple(packed.shape)}."
        )
    rows = packed.reshape(-1, width)
    result = rows if source == target else rows.new_empty(len(rows), _width(layout, target))
    for block in row_blocks(len(rows), layout.in_features):
        digits = _unpack(rows[block], layout, source)
        if source != target:
            result[block] = _pack(digits, layout, target)
    return packed if source == target else result.view(*packed.shape[:-1], -1)


# From here on digits are trits + 1, uint8 (planes, out, in).


def _pack(digits: Tensor, layout: Layout, packing: str) -> Tensor:
    if packing == "dense":
        return _pack_dense(digits, layout)
    codes, planes = [], list(digits)
    for part in layout.parts:
        codes.append(planes.pop(0) if part.bits == 2 else 3 * planes.pop(0) + planes.pop(0))
    return pack(codes, layout)


def _unpack(packed: Tensor, layout: Layout, packing: str) -> Tensor:
    if packing == "dense":
        _check_codes(packed, 3**TRITS_PER_BYTE, packing)
        return _unpack_dense(packed, layout)
    digits = []
    for part, codes in zip(layout.parts, unpack(packed, layout), strict=True):
        _check_codes(codes, 3 ** len(part.basis), packing)
        first = (codes * 11) >> 5  # codes // 3, from 0 to 8
        digits += [codes] if part.bits == 2 else [first, codes - 3 * first]
    return torch.stack(digits)


def _check_codes(codes: Tensor, limit: int, packing: str) -> None:
    if codes.numel() and codes.max() >= limit:
        raise ValueError(
            f"A packed weight holds the code {codes.max()}, {packing!r} ends at {limit - 1}: the file is damaged."
        )


def _pack_dense(digits: Tensor, layout: Layout) -> Tensor:
    parts = []
    for start, groups, length in layout.sections():
        block = digits[:, :, start : start + groups * length].unflatten(-1, (groups, length)).permute(1, 2, 0, 3)
        block = F.pad(block, (0, -length % TRITS_PER_BYTE), value=1).unflatten(-1, (-1, TRITS_PER_BYTE))
        number = block[..., 0]
        for place in range(1, TRITS_PER_BYTE):
            number = 3 * number + block[..., place]
        parts.append(number.flatten(1))
    return torch.cat(parts, dim=1)


def _unpack_dense(packed: Tensor, layout: Layout) -> Tensor:
    # One look-up for the five digits of a byte, which a word of eight bytes holds.
    words = _words(packed.device).index_select(0, packed.flatten().int()).view(packed.shape)
    parts, first = [], 0
    for _, groups, length in layout.sections():
        count = groups * layout.num_scales * _dense_bytes(length)
        block = words[:, first : first + count].contiguous().view(torch.uint8)
        block = block.view(len(packed), groups, layout.num_scales, -1, 8)[..., :TRITS_PER_BYTE].flatten(-2)
        parts.append(block[..., :length].permute(2, 0, 1, 3).flatten(2))
        first += count
    return torch.cat(parts, dim=-1)


@cache
def _words(device: torch.device) -> Tensor:
    numbers = torch.arange(256, device="cpu")[:, None]
    digits = torch.cat([numbers // 3**power % 3 for power in reversed(range(TRITS_PER_BYTE))], dim=1)
    return F.pad(digits.to(torch.uint8), (0, 8 - TRITS_PER_BYTE)).view(torch.int64).flatten().to(device)
