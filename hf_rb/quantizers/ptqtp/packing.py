"""Trit-planes and their two byte layouts.

A weight of group g in row i is  w = sum_k scales[i, g, k] * trits[k, i, j]  with trits in {-1, 0, 1}. Every group starts at a
byte of its own in both layouts, so a tensor can be cut at any multiple of `group_size`:

- `"dense"`: five trits of one plane a byte, as the base-3 number of their digits `trit + 1`, first trit most significant
  (0 to 242). A group stores its planes one after the other: 2 x 26 bytes for 128 weights, 3.25 bits a weight.
- `"nibble"`: one code a weight, the base-3 number of its planes' digits (0 to 8 for two planes). Byte j of a group of
  length n holds code j in the low half and code j + ceil(n / 2) in the high half: 4 bits a weight.

A group shorter than `group_size`, the last of a row, is laid out by its own length. Unused places hold zero trits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.config import PTQTPConfig

__all__ = ["TritPlanes", "dequantize", "packed_width", "row_blocks", "sections"]

TRITS_PER_BYTE = 5
_POWERS = torch.tensor([81, 27, 9, 3, 1], dtype=torch.uint8, device="cpu")
_DIGITS = torch.cartesian_prod(*[torch.arange(-1, 2, dtype=torch.int8, device="cpu")] * TRITS_PER_BYTE)  # (243, 5)


def sections(in_features: int, group_size: int) -> list[tuple[int, int, int]]:
    """Cuts a row into its full groups and its short last group: `(first weight, groups, group length)` of each part."""
    full, rest = divmod(in_features, group_size)
    parts = [(0, full, group_size), (full * group_size, 1, rest)]
    return [(start, groups, length) for start, groups, length in parts if groups and length]


def packed_width(in_features: int, group_size: int, planes: int, packing: str) -> int:
    """Returns the bytes that one packed row takes, without its scales."""
    return sum(
        groups * _group_bytes(length, planes, packing) for _, groups, length in sections(in_features, group_size)
    )


def _group_bytes(length: int, planes: int, packing: str) -> int:
    if packing == "dense":
        return planes * -(-length // TRITS_PER_BYTE)
    if packing == "nibble":
        if planes > 2:
            raise ValueError(f"packing='nibble' holds 1 or 2 planes, got {planes}. Use packing='dense'.")
        return -(-length // 2)
    raise ValueError(f"packing must be 'dense' or 'nibble', got {packing!r}.")


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
            Whether the absolute stopping rule was too coarse for this matrix and it was solved again with the relative one.
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
                `"dense"` (26 bytes a plane and group of 128) or `"nibble"` (64 bytes a group of 128).

        Returns:
            `dict[str, torch.Tensor]`: `weight`, uint8 `(out_features, packed_width(...))`, and `weight_scale`.
        """
        _group_bytes(self.group_size, len(self.trits), packing)  # refuses what does not fit
        pack = _pack_dense if packing == "dense" else _pack_nibble
        digits = (self.trits + 1).to(torch.uint8)
        parts = [
            pack(digits[:, :, start : start + groups * length].unflatten(-1, (groups, length)).permute(1, 2, 0, 3))
            for start, groups, length in sections(self.shape[1], self.group_size)
        ]
        return {"weight": torch.cat([part.flatten(1) for part in parts], dim=1), "weight_scale": self.scales}

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
        width = packed_width(in_features, config.group_size, planes, config.packing)
        if packed.shape != (len(scales), width) or groups != -(-in_features // config.group_size):
            raise ValueError(
                f"A packed weight of shape {tuple(packed.shape)} with scales {tuple(scales.shape)} is not a matrix with "
                f"{in_features} columns in groups of {config.group_size} ({config.packing}, {width} bytes a row expected). "
                "If the last group of a row is shorter than the others, pass `in_features`."
            )
        unpack = _unpack_dense if config.packing == "dense" else _unpack_nibble
        parts, first = [], 0
        for _, groups, length in sections(in_features, config.group_size):
            columns = slice(first, first + groups * _group_bytes(length, planes, config.packing))
            blocks = unpack(
                packed[:, columns].unflatten(-1, (groups, -1)), planes, length
            )  # (out, groups, planes, length)
            parts.append(blocks.permute(2, 0, 1, 3).flatten(2))
            first = columns.stop
        return cls(torch.cat(parts, dim=-1), scales, config.group_size)


def row_blocks(rows: int, in_features: int) -> Iterator[slice]:
    """Cuts a matrix into rows of about a million weights, the most that is held in an unpacked form at a time."""
    step = max(1, (1 << 20) // in_features)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def dequantize(
    tensors: dict[str, Tensor], config: "PTQTPConfig", in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the matrix `(out_features, in_features)` of packed `tensors`, without ever holding all of its trits."""
    weight = torch.empty(len(tensors["weight"]), in_features, dtype=dtype, device=tensors["weight"].device)
    for rows in row_blocks(*weight.shape):
        block = {name: tensor[rows] for name, tensor in tensors.items()}
        weight[rows] = TritPlanes.unpack(block, config, in_features).dequantize(dtype)
    return weight


def _pack_dense(digits: Tensor) -> Tensor:
    digits = F.pad(digits, (0, -digits.shape[-1] % TRITS_PER_BYTE), value=1)
    return (digits.unflatten(-1, (-1, TRITS_PER_BYTE)) * _POWERS.to(digits.device)).sum(-1, dtype=torch.uint8)


def _unpack_dense(packed: Tensor, planes: int, length: int) -> Tensor:
    _check_codes(packed, len(_DIGITS), "dense")
    trits = _DIGITS.to(packed.device)[packed.int()]
    return trits.flatten(-2).unflatten(-1, (planes, -1))[..., :length]


def _pack_nibble(digits: Tensor) -> Tensor:
    planes = digits.shape[-2]
    codes = sum(digits[:, :, plane] * 3 ** (planes - 1 - plane) for plane in range(planes))
    codes = F.pad(codes, (0, codes.shape[-1] % 2), value=3**planes // 2)
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack_nibble(packed: Tensor, planes: int, length: int) -> Tensor:
    codes = torch.cat([packed & 15, packed >> 4], dim=-1)[..., :length]
    _check_codes(codes, 3**planes, "nibble")
    digits = [codes // 3 ** (planes - 1 - plane) % 3 for plane in range(planes)]
    return torch.stack(digits, dim=-2).to(torch.int8) - 1


def _check_codes(codes: Tensor, limit: int, packing: str) -> None:
    if codes.numel() and codes.max() >= limit:
        raise ValueError(
            f"A packed weight holds the code {codes.max()}, {packing!r} ends at {limit - 1}: the file is damaged."
        )
