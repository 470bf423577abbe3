"""The kernels for processors: `gemv.c`, and panels of the matrix through torch's own multiplication."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_rb.io import native
from hf_rb.quantizers.kernels.layout import Layout


__all__ = ["Kernel", "kernel"]

SOURCE = Path(__file__).with_name("gemv.c")
MAX_PARTS, MAX_BASIS = 3, 4
COMPUTE_TYPES = (torch.float32, torch.bfloat16)

# Up to so many rows of activations, rounding them to 8 bits pays; up to so many, going through the packed matrix costs
# less than expanding it (`benchmarks/ptqtp_kernels.py`). The size of the matrix hardly moves the second limit: in
# bfloat16 it lies between 14 rows (576 x 576) and 20 (4096 x 4096) with AVX-512, between 8 and 9 with AVX2.
INT8_ROWS = 3
GEMV_ROWS = {"avx512vnni": 16, "avx2": 8}
PANEL = 1 << 20  # weights that are expanded at a time
_workspace = threading.local()  # memory for a panel, by type
WEIGHTS_PER_THREAD = 1 << 17  # below that, waking a thread costs more than it gains


@cache
def kernel() -> "Kernel | None":
    """Returns the kernel for this processor, or `None` (after one warning) if it cannot be built."""
    variant = native.variant()
    library = native.load(SOURCE, variant)
    return Kernel(library, variant) if library else None


class _Part(Structure):
    _fields_ = [
        ("bits", c_int32),
        ("rows", c_int32),
        ("lowest", c_int32 * MAX_BASIS),
        ("basis", c_float * 16 * MAX_BASIS),
        ("above", c_uint8 * 16 * MAX_BASIS),
    ]


class _Layout(Structure):
    _names = ("in_features", "group_size", "groups", "row_bytes", "num_scales", "num_parts")
    _fields_ = [*((name, c_int64) for name in _names), ("part", _Part * MAX_PARTS)]


class Kernel:
    """
    The functions of `gemv.c` on tensors.

    Attributes:
        decodes (`bool`): Whether `gemv` is faster than a multiplication with the dequantized matrix. Without vector
            instructions it is four to six times slower (4096 x 4096).
    """

    def __init__(self, library: ctypes.CDLL, variant: str):
        self.variant = variant
        self.decodes = variant in GEMV_ROWS
        matrix = [POINTER(_Layout), c_void_p, c_void_p, c_int64]
        self._gemv, self._expand = library.hf_rb_gemv, library.hf_rb_expand
        self._gemv.argtypes = [*matrix, c_void_p, c_int64, c_int, c_int, c_int, c_void_p]
        self._expand.argtypes = [*matrix, c_int, c_int, c_void_p]
        self._layouts: dict[str, _Layout] = {}

    def takes(self, dtype: torch.dtype, weight: Tensor, scale: Tensor, layout: Layout) -> bool:
        """Returns whether `gemv` and `expand` can work on this matrix in this type."""
        return (
            dtype in COMPUTE_TYPES
            and weight.is_cpu
            and scale.is_cpu
            and scale.dtype is torch.float16
            and weight.is_contiguous()
            and scale.is_contiguous()
            and len(layout.parts) <= MAX_PARTS
            and max(len(part.basis) for part in layout.parts) <= MAX_BASIS
        )

    def linear(self, input: Tensor, weight: Tensor, scale: Tensor, layout: Layout, int8: bool = False) -> Tensor:
        """Returns `input @ weight.T` `(..., out_features)` in the faster way."""
        rows = input.numel() // layout.in_features
        if rows > GEMV_ROWS.get(self.variant, 0):
            return self.matmul(input, weight, scale, layout)
        return self.gemv(input, weight, scale, layout, int8 and rows <= INT8_ROWS)

    def gemv(self, input: Tensor, weight: Tensor, scale: Tensor, layout: Layout, int8: bool = False) -> Tensor:
        """Returns `input @ weight.T` `(..., out_features)`, for few rows of activations."""
        input = input.contiguous()
        output = input.new_empty(*input.shape[:-1], len(weight))
        self._run(
            self._gemv,
            *self._matrix(weight, scale, layout),
            input.data_ptr(),
            input.numel() // layout.in_features,
            input.dtype is torch.bfloat16,
            int8,
            _threads(len(weight) * layout.in_features),
            output.data_ptr(),
        )
        return output

    def expand(
        self, weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype, output: Tensor | None = None
    ) -> Tensor:
        """Returns the matrix `(out_features, in_features)`, in the memory of `output` if that is given."""
        if output is None:
            output = torch.empty(len(weight), layout.in_features, dtype=dtype)
        self._run(
            self._expand,
            *self._matrix(weight, scale, layout),
            dtype is torch.bfloat16,
            _threads(output.numel()),
            output.data_ptr(),
        )
        return output

    def dequantize(self, weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Returns the matrix `(out_features, in_features)` in any type."""
        if dtype in COMPUTE_TYPES:
            return self.expand(weight, scale, layout, dtype)
        output = torch.empty(len(weight), layout.in_features, dtype=dtype)
        for rows, panel in self._panels(weight, scale, layout, torch.float32):
            output[rows] = panel
        return output

    def matmul(self, input: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
        """Returns `input @ weight.T` `(..., out_features)`, for many rows of activations."""
        output = input.new_empty(*input.shape[:-1], len(weight))
        for rows, panel in self._panels(weight, scale, layout, input.dtype):
            output[..., rows] = F.linear(input, panel)
        return output

    def matmul_transposed(self, grad: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
        """Returns `grad @ weight` `(..., in_features)`."""
        output = grad.new_zeros(*grad.shape[:-1], layout.in_features, dtype=torch.float32)
        for rows, panel in self._panels(weight, scale, layout, grad.dtype):
            output += grad[..., rows] @ panel
        return output.to(grad.dtype)

    def _panels(
        self, weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """Expands the matrix piece by piece, each in the memory of the last one: to be given new memory takes
        longer.
        """
        step = max(1, PANEL // layout.in_features)
        size = min(step, len(weight)) * layout.in_features
        kept: dict[Any, Tensor] = _workspace.__dict__
        memory = kept.get(dtype)
        if memory is None or memory.numel() < size:
            with torch.inference_mode(False):
                memory = kept[dtype] = torch.empty(size, dtype=dtype)
        for first in range(0, len(weight), step):
            rows = slice(first, min(first + step, len(weight)))
            output = memory[: (rows.stop - first) * layout.in_features].view(-1, layout.in_features)
            yield rows, self.expand(weight[rows], scale[rows], layout, dtype, output)

    def _matrix(self, weight: Tensor, scale: Tensor, layout: Layout) -> tuple:
        rows, width = weight.shape
        if width != layout.row_bytes or scale.shape != (rows, layout.groups, layout.num_scales):
            raise ValueError(
                f"A packed weight of shape {tuple(weight.shape)} with scales {tuple(scale.shape)} does not fit "
                f"{layout}."
            )
        structure = self._layouts.get(layout.key)
        if structure is None:
            structure = self._layouts[layout.key] = _structure(layout)
        return structure, weight.data_ptr(), scale.data_ptr(), rows

    @staticmethod
    def _run(function: Callable[..., int], *arguments: Any) -> None:
        if function(*arguments):
            raise MemoryError("A kernel has no memory for its activations.")


def _structure(layout: Layout) -> _Layout:
    parts = []
    for part in layout.parts:
        lowest = [min(row) for row in part.basis]
        # Codes that are not in use mean zero. Shorter tables are repeated: the kernel leaves the bits above a code in
        # place.
        rows = [(*row, *[0] * (2**part.bits - len(row))) * (16 >> part.bits) for row in part.basis]
        above = [[max(value - low, 0) for value in row] for row, low in zip(rows, lowest, strict=True)]
        parts.append(
            _Part(
                part.bits,
                len(rows),
                (c_int32 * MAX_BASIS)(*lowest),
                (c_float * 16 * MAX_BASIS)(*((c_float * 16)(*row) for row in rows)),
                (c_uint8 * 16 * MAX_BASIS)(*((c_uint8 * 16)(*row) for row in above)),
            )
        )
    group_size = min(layout.group_size, layout.in_features)  # a group takes memory of its length
    sizes = layout.in_features, group_size, layout.groups, layout.row_bytes, layout.num_scales, len(parts)
    return _Layout(*sizes, (_Part * MAX_PARTS)(*parts))


def _threads(weights: int) -> int:
    return min(torch.get_num_threads(), max(1, weights // WEIGHTS_PER_THREAD))
