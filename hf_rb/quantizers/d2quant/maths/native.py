"""The compiled inner loops (`solver.c`), for float32 in main memory."""

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hf_rb.io import native


__all__ = ["Solver", "solver"]

SOURCE = Path(__file__).with_name("solver.c")


def solver(tensor: Tensor) -> "Solver | None":
    """Returns the compiled loops if there are any and they can take `tensor`."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return None
    return _solver(native.load(SOURCE, native.variant()))


@cache
def _solver(library: ctypes.CDLL | None) -> "Solver | None":
    return Solver(library) if library else None


class _Rounding(ctypes.Structure):
    _fields_ = [
        ("levels", c_int64),
        ("last", c_float),
        *((name, c_void_p) for name in ("step", "lowest", "inverse", "value", "code", "middle", "column")),
    ]


class Solver:
    """The functions of `solver.c` on tensors. Blocks are `(length, rows)`: the columns of a group, one after the
    other.
    """

    def __init__(self, library: ctypes.CDLL):
        block = [c_void_p, c_int64, c_int64]
        self._fit_grids, self._fit_dual = library.hf_rb_fit_grids, library.hf_rb_fit_dual
        self._fit_grids.argtypes = [*block, c_int, c_int, c_int, c_void_p, c_void_p]
        self._fit_dual.argtypes = [*block, c_int, c_int, c_void_p, c_double, c_float, c_int, c_void_p, c_void_p]
        self._round_columns = library.hf_rb_round_columns
        self._round_columns.argtypes = [*block, POINTER(_Rounding), c_void_p, c_void_p, c_int, c_void_p, c_void_p]

    def fit_grids(self, block: Tensor, bits: int, shares: int) -> tuple[Tensor, Tensor]:
        """Returns the step and the zero point of every row, float32 `(rows,)`."""
        block, step, zero = block.contiguous(), block.new_empty(block.shape[1]), block.new_empty(block.shape[1])
        _check(self._fit_grids(*_block(block), 2**bits - 1, shares, _threads(), step.data_ptr(), zero.data_ptr()))
        return step, zero

    def fit_dual(
        self,
        block: Tensor,
        columns: Tensor,
        planes: int,
        rounds: int,
        weights: Tensor | None,
        smallest_factor: float,
        smallest_column: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns row scales `(rows, planes)` and column scales `(length,)`, from the first ones and the columns'
        weights.
        """
        block, columns = block.contiguous(), columns.clone()
        weights = None if weights is None else weights.contiguous()
        scales = block.new_empty(planes, block.shape[1])
        outputs = scales.data_ptr(), columns.data_ptr()
        weighting = None if weights is None else weights.data_ptr()
        numbers = planes, rounds, weighting, smallest_factor, smallest_column, _threads()
        _check(self._fit_dual(*_block(block), *numbers, *outputs))
        return scales.T, columns

    def round_columns(
        self, block: Tensor, rounding: dict[str, Tensor | int], factor: Tensor, residual: Tensor | None, codes: Tensor
    ) -> Tensor:
        """Rounds the columns of a contiguous block in turn, in place, and returns their errors; fills in `codes`."""
        tensors = {name: value.contiguous() for name, value in rounding.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in rounding.items() if name not in tensors}
        structure = _Rounding(**numbers, **{name: tensor.data_ptr() for name, tensor in tensors.items()})
        factor, errors = factor.contiguous(), torch.empty_like(block)
        residual = None if residual is None else residual.contiguous()
        matrices = factor.data_ptr(), None if residual is None else residual.data_ptr()
        outputs = codes.data_ptr(), errors.data_ptr()
        _check(self._round_columns(*_block(block), ctypes.byref(structure), *matrices, _threads(), *outputs))
        return errors


def _block(block: Tensor) -> tuple[int, ...]:
    return block.data_ptr(), *block.shape


def _threads() -> int:
    return torch.get_num_threads()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("There is no memory for a group of weights.")
