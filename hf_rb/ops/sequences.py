"""The sequences of a batch, however it is laid out, and random draws that follow the sequence rather than the
batch.
"""

from collections.abc import Mapping
from typing import Any

import torch


__all__ = ["Sequences"]


class Sequences:
    """
    Finds the sequences of a collated batch: one a row when the rows are padded, several a row in padding-free batches,
    where `position_ids` restart at each. A fragment of a sequence that packing has cut is a sequence.

    Args:
        inputs (`Mapping`):
            Batch with `input_ids` of shape (B, L) and `attention_mask` or `position_ids`, both (B, L), or neither.

    Attributes:
        positions (`torch.Tensor` of shape `(B, L)`):
            Position of each token in its sequence, from 0.
    """

    def __init__(self, inputs: Mapping[str, Any]):
        self._input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self._is_token = torch.ones_like(self._input_ids) if mask is None else mask
        positions = inputs.get("position_ids")
        self.positions = (self._is_token.cumsum(-1) - 1).clamp(min=0) if positions is None else positions
        # Padding before a row's first token counts as sequences of its own, which hold no label. A row begins a
        # sequence, also where its first token is not the first of a text.
        self._is_start = self.positions == 0
        self._is_start[:, 0] = True
        self._index = self._is_start.flatten().cumsum(0) - 1

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sums `values` (B, L) over each sequence, and gives every token (B, L) the sum of its own."""
        sums = torch.zeros_like(values.flatten()).scatter_add(0, self._index, values.flatten())
        return sums[self._index].view_as(values)

    def spans(self) -> list[tuple[int, int]]:
        """Returns where each sequence of tokens starts and ends among the batch's B · L tokens, in their order."""
        is_token = self._is_token.flatten().bool()
        starts = is_token & self._is_start.flatten()
        lengths = torch.bincount(self._index[is_token])
        return [
            (start, start + length)
            for start, length in zip(starts.nonzero().flatten().tolist(), lengths[lengths > 0].tolist(), strict=True)
        ]

    def uniforms(self, seed: int, step: int) -> torch.Tensor:
        """
        Draws a number for every token from [0, 1).

        The draw is a function of the seed, the training step, the token ids of the sequence and the token's position,
        and of nothing else: no generator has a state, so splitting, padding or packing the batch otherwise changes no
        draw.

        Returns:
            `torch.Tensor` of shape `(B, L)` and type `float32`.
        """
        stride = self.positions * _GOLDEN
        sequence = self.total(_mix(_mix(self._input_ids + _GOLDEN) + stride) * self._is_token)
        key = torch.tensor(seed, device=sequence.device) + _GOLDEN
        key = _mix(_mix(key) + step)
        draws = _mix(_mix(sequence ^ key) + stride)
        return _shift(draws, 40).float() * 2.0**-24


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64, where `>>` would copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014) on int64, whose products wrap around: every bit depends on
    all.
    """
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
