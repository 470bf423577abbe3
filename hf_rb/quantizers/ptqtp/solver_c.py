"""The compiled solver (`solver.c`), for matrices of at most 32 bits a weight in main memory."""

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_double, c_float, c_int, c_int8, c_int32, c_int64, c_uint8
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hf_rb.io import native
from hf_rb.quantizers.ptqtp.options import SolverOptions


__all__ = ["Solver", "solver"]

SOURCE = Path(__file__).with_name("solver.c")
BLOCK = 1 << 22  # weights that are turned into float32 at a time
OUT_OF_MEMORY = 2
MAX_STARTS = 4


def solver(weight: Tensor) -> "Solver | None":
    """Returns the compiled solver if there is one and it can take `weight`."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return _solver(native.load(SOURCE, native.variant()))


@cache
def _solver(library: ctypes.CDLL | None) -> "Solver | None":
    return Solver(library) if library else None


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("planes", "starts", "tied", "max_iter", "relative", "paper_start")),
        ("start", c_double * 3 * MAX_STARTS),
        ("direction", c_double * 3),
        *((name, c_double) for name in ("reach", "tol", "ridge_init", "ridge_max", "kappa_threshold")),
    ]


class Solver:
    """The two functions of `solver.c` on tensors."""

    def __init__(self, library: ctypes.CDLL):
        matrix = [POINTER(c_float), c_int64, c_int64, c_int64]  # weight, rows, columns, group size
        self._fit, self._encode = library.hf_rb_fit, library.hf_rb_encode
        self._fit.argtypes = [*matrix, POINTER(_Options), c_int, POINTER(c_double)]
        outputs = [POINTER(c_uint8), POINTER(c_int8), POINTER(c_double), POINTER(c_double)]
        self._encode.argtypes = [*matrix, c_int, POINTER(c_float), c_int, c_int64, *outputs]

    def fit(self, weight: Tensor, group_size: int, options: SolverOptions) -> Tensor:
        """Returns canonical float64 scales `(out_features, groups, planes)`."""
        scales = torch.empty(len(weight), -(-weight.shape[1] // group_size), options.planes, dtype=torch.float64)
        structure = _structure(options)
        for rows, block in _blocks(weight):
            arguments = *_matrix(block, group_size), structure, torch.get_num_threads(), _pointer(scales[rows])
            _check(self._fit(*arguments))
        return scales

    def trits(self, weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
        """Returns the best trits `(planes, out_features, in_features)`, int8, for given scales."""
        trits = torch.empty(scales.shape[-1], *weight.shape, dtype=torch.int8)
        for rows, block in _blocks(weight):
            found = torch.empty(len(trits), *block.shape, dtype=torch.int8)
            self._run_encode(block, scales[rows], group_size, trits=found)
            trits[:, rows] = found
        return trits

    def encode(self, weight: Tensor, scales: Tensor, group_size: int, row_bytes: int) -> tuple[Tensor, float, float]:
        """Returns the best trits packed in the kernels' layout, the squared error and the squared norm of the
        weight.
        """
        packed = torch.empty(len(weight), row_bytes, dtype=torch.uint8)
        sums = [self._run_encode(block, scales[rows], group_size, packed[rows]) for rows, block in _blocks(weight)]
        error, norm = torch.cat(sums, dim=1).sum(1).tolist()
        return packed, error, norm

    def _run_encode(
        self, block: Tensor, scales: Tensor, group_size: int, packed: Tensor | None = None, trits: Tensor | None = None
    ) -> Tensor:
        scales = scales.float().contiguous()
        sums = torch.empty(2, len(block), dtype=torch.float64)
        _check(
            self._encode(
                *_matrix(block, group_size),
                scales.shape[-1],
                _pointer(scales),
                torch.get_num_threads(),
                0 if packed is None else packed.shape[1],
                None if packed is None else _pointer(packed),
                None if trits is None else _pointer(trits),
                _pointer(sums[0]),
                _pointer(sums[1]),
            )
        )
        return sums


def _structure(options: SolverOptions) -> _Options:
    ratios = [start for start in options.starts if start]
    direction = options.direction.tolist() if options.direction is not None else [0.0]
    rows = [(c_double * 3)(*start) for start in ratios]
    return _Options(
        planes=options.planes,
        starts=len(ratios),
        paper_start=None in options.starts,
        tied=options.direction is not None,
        max_iter=options.max_iter,
        relative=options.relative,
        start=(c_double * 3 * MAX_STARTS)(*rows),
        direction=(c_double * 3)(*direction),
        reach=options.reach,
        tol=options.tol,
        ridge_init=options.ridge_init,
        ridge_max=options.ridge_max,
        kappa_threshold=options.kappa_threshold,
    )


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    weight = weight.detach()
    step = max(1, BLOCK // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        yield rows, weight[rows].float().contiguous()


def _matrix(block: Tensor, group_size: int) -> tuple:
    return _pointer(block), *block.shape, group_size


_TYPES = {torch.float32: c_float, torch.float64: c_double, torch.uint8: c_uint8, torch.int8: c_int8}


def _pointer(tensor: Tensor):
    return ctypes.cast(tensor.data_ptr(), POINTER(_TYPES[tensor.dtype]))


def _check(code: int) -> None:
    if code == OUT_OF_MEMORY:
        raise MemoryError("The solver has no memory for a group of weights.")
    if code:
        raise ValueError("The weight has a NaN or an infinite value.")
