"""One packed weight: its bytes, what turns them into numbers, and the names of these tensors in models and files.

A weight called `<name>` is up to five tensors, in a model as parameters and in a file of format v1:

    <name>           uint8: the codes; in memory in the kernels' layout
    <name>_scale     float16
    <name>_column    float32, D²Quant: a factor of every input
    <name>_hi        uint8, D²Quant with 3 bits, in files only: the third bits
    <name>_zero      uint8, D²Quant on grids, in files only: zero points

Which of them there are, and their shapes, a method says (`ptqtp/format.py`, `d2quant/format.py`). Leading dimensions,
those of experts, are the same in all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels.layout import Layout


__all__ = ["SUFFIXES", "DamagedTensor", "PackedWeight"]

# Endings that a weight's name gets for each of its tensors.
SUFFIXES = {"packed": "", "scale": "_scale", "column": "_column", "hi": "_hi", "zero": "_zero"}


class DamagedTensor(ValueError):
    """Says what is wrong with a tensor of a file, whose name ends in `suffix`."""

    def __init__(self, message: str, part: str = "packed"):
        super().__init__(message)
        self.suffix = SUFFIXES[part]


@dataclass
class PackedWeight:
    """
    The tensors of a packed weight, of memory or of a file.

    Attributes:
        packed (`torch.Tensor`): uint8 `(*rows, bytes of a row)`.
        scale (`torch.Tensor`): float16 `(*rows, groups, …)`.
        column (`torch.Tensor`, *optional*): float32 `(*rows[:-1], in_features)`, what the columns are multiplied with.
        hi (`torch.Tensor`, *optional*): uint8, the third bits of a file.
        zero (`torch.Tensor`, *optional*): uint8, the zero points of a file.
    """

    packed: Tensor
    scale: Tensor
    column: Tensor | None = None
    hi: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def collect(cls, name: str, get: Callable[[str], Tensor | None]) -> "PackedWeight":
        """
        Returns the weight called `name` of a model or file, in which `get` looks up a tensor by its full name.

        Raises:
            DamagedTensor: There are no scales.
        """
        tensors: dict[str, Any] = {part: get(name + suffix) for part, suffix in SUFFIXES.items()}
        if tensors["scale"] is None:
            raise DamagedTensor("not in the checkpoint.", "scale")
        return cls(**tensors)

    def parts(self) -> dict[str, Tensor]:
        """Returns the tensors that there are, by attribute."""
        return {part: tensor for part in SUFFIXES if (tensor := getattr(self, part)) is not None}

    def named(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors that there are, by the names that they have where the weight is called `name`."""
        return {name + SUFFIXES[part]: tensor for part, tensor in self.parts().items()}

    def __getitem__(self, index: int) -> "PackedWeight":
        """Returns the weight of one expert."""
        return PackedWeight(**{part: tensor[index] for part, tensor in self.parts().items()})

    @staticmethod
    def join(weights: "Sequence[PackedWeight]", function: Callable[[list[Tensor]], Tensor]) -> "PackedWeight":
        """Returns the weight whose tensors `function` (`torch.cat`, `torch.stack`) makes of those of several."""
        return PackedWeight(**{part: function([getattr(one, part) for one in weights]) for part in weights[0].parts()})

    def check(self, kind: str, **expected: tuple[torch.dtype, tuple[int, ...]]) -> None:
        """
        Checks the tensors of a file.

        Args:
            kind (`str`):
                What is packed, for messages.
            expected (`tuple[torch.dtype, tuple[int, ...]]`):
                Type and shape of the tensors that there must be, by attribute. Others than the packed one must not be.

        Raises:
            DamagedTensor: A tensor is missing or too many, has another type or shape, or a scale that is none.
        """
        parts = self.parts()
        for part, (dtype, shape) in expected.items():
            if part not in parts:
                raise DamagedTensor("not in the checkpoint.", part)
            if parts[part].dtype != dtype or parts[part].shape != shape:
                found = f"{parts[part].dtype} of shape {tuple(parts[part].shape)}"
                raise DamagedTensor(f"Expected {dtype} of shape {tuple(shape)}, got {found}.", part)
        for part in parts.keys() - expected.keys() - {"packed"}:
            raise DamagedTensor(f"There is no such tensor for {kind}; is the configuration another one?", part)
        for part in expected.keys() & {"scale", "column"}:
            if not ((parts[part] >= 0) & parts[part].isfinite()).all():
                raise DamagedTensor("A scale is negative, infinite or NaN: the file is damaged.", part)

    def dequantize(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Returns the numbers `(*rows, in_features)` of a weight in the form of memory."""
        if self.column is None:
            return kernels.dequantize(self.packed, self.scale, layout, dtype)
        weight = kernels.dequantize(self.packed, self.scale, layout, torch.float32)
        return (weight * self.column[..., None, :]).to(dtype)
