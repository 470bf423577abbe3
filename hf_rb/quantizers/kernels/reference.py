"""The path that needs no kernel: dequantize a matrix once, then multiply as usual.

The dequantized matrix is kept, because unpacking costs far more than a multiplication. A model that has run this way
takes the memory of its packed weights **and** of its weights in the type of the activations; a warning says so once.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hf_rb.quantizers.kernels.layout import Layout, unpack


__all__ = ["dequantize", "forget", "linear", "matrix"]

BLOCK = 1 << 20  # weights that are unpacked at a time


class _Kept(NamedTuple):
    storage: StorageWeakRef  # of the packed weight; while it is held, the address of the storage names nothing else
    state: tuple
    matrix: Tensor


_kept: dict[tuple, _Kept] = {}


def linear(input: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """Returns `input @ weight.T` `(..., out_features)`."""
    return F.linear(input, matrix(weight, scale, layout, input.dtype))


def matrix(weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns the dequantized matrix, which is kept until the packed weight is freed or changed."""
    storage = weight.untyped_storage()
    place = storage._cdata, weight.storage_offset(), weight.shape, weight.device
    state = dtype, layout, _version(weight), _version(scale), scale.data_ptr()
    kept = _kept.get(place)
    if kept is None or kept.state != state:
        forget()
        _warn(dtype, weight.device.type)
        # A tensor born in inference mode could not be trained through.
        with torch.inference_mode(False), torch.no_grad():
            kept = _Kept(StorageWeakRef(storage), state, dequantize(weight, scale, layout, dtype))
        _kept[place] = kept
    return kept.matrix


def forget() -> None:
    """Frees the matrices whose packed weights are gone."""
    for place, kept in list(_kept.items()):
        if kept.storage.expired():
            _kept.pop(place, None)  # another thread may have been first


def dequantize(weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns the matrix `(out_features, in_features)`, summed in float32 (or the wider type of the scales)."""
    output = torch.empty(len(weight), layout.in_features, dtype=dtype, device=weight.device)
    step = max(1, BLOCK // layout.in_features)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        output[rows] = _dequantize(weight[rows], scale[rows], layout)
    return output


def _dequantize(weight: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
    codes = [code.long() for code in unpack(weight, layout)]
    tables, first = [], 0
    for part in layout.parts:
        table = scale.new_zeros(*scale.shape[:2], 2**part.bits)
        for row in part.basis:
            table[..., : len(row)] += scale[..., first, None] * scale.new_tensor(row)
            first += 1
        tables.append(table)
    columns, group = [], 0
    for start, groups, length in layout.sections():
        places = slice(start, start + groups * length)
        block: Any = 0
        for table, code in zip(tables, codes, strict=True):
            block = block + table[:, group : group + groups].gather(
                -1, code[:, places].unflatten(-1, (groups, length))
            )
        columns.append(block.flatten(1))
        group += groups
    return torch.cat(columns, dim=-1)


@cache
def _warn(dtype: torch.dtype, device: str) -> None:
    if device != "meta":
        warnings.warn(
            f"There is no kernel for {dtype} activations on this device ({device}): besides the packed weights, "
            f"memory will hold the dequantized ones, in {dtype}.",
            RuntimeWarning,
            stacklevel=2,
        )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
