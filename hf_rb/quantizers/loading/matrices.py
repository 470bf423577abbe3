"""Place of a matrix in a model, and the result of quantizing it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_rb.quantizers.packed.linear import PackedModule
from hf_rb.quantizers.packed.weight import PackedWeight


__all__ = ["Place", "Solved", "by_block"]


class Solved(NamedTuple):
    """
    A quantized matrix.

    Attributes:
        weight ([`~hf_rb.quantizers.packed.weight.PackedWeight`]): What it is in memory.
        relative_error (`float`): Frobenius norm of what is lost over that of the matrix.
        resolved (`bool`): Whether it was solved a second time.
    """

    weight: PackedWeight
    relative_error: float
    resolved: bool


@dataclass(frozen=True)
class Place:
    """
    Place of a file's matrix in its parameter.

    Attributes:
        expert (`int`, *optional*): Number of the expert.
        first (`int`): First of its rows.
        read (`Callable[[str], torch.Tensor]`): Returns what belongs there of another parameter, `(out, in)`.
    """

    expert: int | None
    first: int
    read: Callable[[str], Tensor]


def by_block(
    module: PackedModule, name: str, matrix: Tensor, function: Callable[[Tensor], PackedWeight]
) -> PackedWeight:
    """Quantizes a matrix for a parameter of a module, the halves of a joined gate and up one after the other: most
    checkpoints have them apart, and what comes out does not depend on that. Messages name the one.
    """
    joined = name == "gate_up_proj" and module.is_concatenated and len(matrix) == getattr(module, name).shape[-2]
    results = []
    for block, half in zip(matrix.chunk(2) if joined else [matrix], ("gate_proj", "up_proj"), strict=False):
        try:
            results.append(function(block))
        except (ValueError, MemoryError) as error:
            raise ValueError(f"{half}: {error}" if joined else str(error)) from error
    return PackedWeight.join(results, torch.cat) if joined else results[0]
