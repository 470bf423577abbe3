r"""Multiplication by packed weights, in Triton.

How codes become numbers, `digits.py` says.

**Where a byte's weights are.** Byte j of a group of n weights holds the weights j, j + q, j + 2q, ... with q = ceil(n
/ codes in a byte). One shift of a tile of neighbouring bytes is therefore a tile of neighbouring weights, a *slice*,
and its activations are neighbours too. The parts of a layout add up: each goes through the same loop by itself.

Shapes: M rows of activations, N output features, Q bytes that a part has in a group.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.kernels.triton.decode import dequantize
from hf_rb.quantizers.kernels.triton.digits import INTERPRETED, coefficients, constants, weights


__all__ = ["MAX_GROUP", "MAX_ROWS", "dequantize", "matmul", "multiply"]

# Up to this many rows of activations the weights are decoded as they are multiplied, above it once for all rows.
MAX_ROWS = 256
# `tl.dot` takes the weights of a whole group, of at most this length, and 16-bit types: others have no tensor cores.
MAX_TILE = 128
# Without `tl.dot` activations are multiplied row by row, up to so many rows.
MAX_VECTORS = 8
# The longest group that is taken at all.
MAX_GROUP = 1024
# Programs for every multiprocessor of the device; with fewer, the groups of a row are divided among several.
PROGRAMS = 4

# Up to this many rows of bfloat16 activations the weights are not rounded to bfloat16: memory, not arithmetic, takes
# the time.
EXACT_ROWS = 64


@triton.jit
def _load(ptrs: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _dot(x: tl.tensor, weight: tl.tensor, acc: tl.tensor):
    """Adds `x @ weight.T`, with the weight rounded to the type of `x`."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(weight), acc)
    else:
        return tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee")


@triton.jit
def _dot_twice(x: tl.tensor, weight: tl.tensor, acc: tl.tensor):
    """Adds `x @ weight.T` for bfloat16 `x` in two halves: the 8 leading bits of the weight, and the rest rounded to 8
    bits.
    """
    high = (weight.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return _dot(x, weight - high, _dot(x, high, acc))


@triton.jit
def _section(
    total: tl.tensor,
    x_rows: tl.tensor,
    weight_rows: tl.tensor,
    scale_rows: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    LENGTH: tl.constexpr,
    OFFSET: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    VECTOR: tl.constexpr,
    TWICE: tl.constexpr,
):
    """
    Adds to `total` what one part of the groups `first` to `last`, all of one length, contributes.

    A single row of activations (`VECTOR`, `total` is (N,)) is multiplied in float32, more (`total` is (M, N)) by
    `tl.dot`. `x_rows`, `weight_rows` and `scale_rows` point to where the rows begin.
    """
    BITS: tl.constexpr = PARTS[PART]
    BYTES: tl.constexpr = (LENGTH * BITS + 7) // 8
    Q: tl.constexpr = triton.next_power_of_2(BYTES) if BYTES > 16 else 16
    WHOLE: tl.constexpr = (BYTES == Q) & (BYTES * 8 == LENGTH * BITS)
    j = tl.arange(0, Q)
    if VECTOR:
        acc = tl.zeros([weight_rows.shape[0], Q], tl.float32)
    else:
        acc = total
    for g in range(first, last):
        weight_ptrs = weight_rows[:, None] + (g * GROUP_BYTES + OFFSET + j)[None, :]
        packed = _load(weight_ptrs, (j < BYTES)[None, :], WHOLE).to(tl.int32) | 0x4B000000
        scale_ptrs = scale_rows + g * (len(DIGITS) // 3)
        a, b, c = coefficients(scale_ptrs, PARTS[PART + 3], PARTS[PART + 4], DIGITS)
        for i in tl.static_range(8 // BITS):
            # The code stays where it is in its byte.
            code = packed & (0x4B000000 + (((1 << BITS) - 1) << (i * BITS)))
            weight = weights(
                code, a[:, None], b[:, None], c[:, None], PARTS[PART + 1], PARTS[PART + 2], 1 << (i * BITS)
            )
            place = i * BYTES + j
            there = (j < BYTES) & (place < LENGTH)
            if VECTOR:
                x = _load(x_rows + g * GROUP + place, there, WHOLE)
                acc += x.to(tl.float32)[None, :] * weight
            else:
                x_ptrs = x_rows[:, None] + (g * GROUP + place)[None, :]
                x = _load(x_ptrs, there[None, :], WHOLE)
                if TWICE:
                    acc = _dot_twice(x, weight, acc)
                else:
                    acc = _dot(x, weight, acc)
    if VECTOR:
        acc = total + tl.sum(acc, axis=1)
    return acc


@triton.jit
def _matmul_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    full: tl.tensor,
    per_program: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    scale_stride: tl.tensor,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWICE: tl.constexpr,
):
    """`out[k, m, n]`: the sum over the `per_program` groups that are program k's, out of `full` whole ones in a
    row.
    """
    VECTOR: tl.constexpr = BLOCK_M == 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1)
    # Past the end come the first rows once more. They are not stored.
    weight_rows = weight_ptr + (n % N).to(tl.int64) * weight_stride
    scale_rows = scale_ptr + (n % N).to(tl.int64) * scale_stride
    out_ptrs = out_ptr + k.to(tl.int64) * M * N + n
    if VECTOR:
        m = tl.program_id(2)
        x_rows = x_ptr + m.to(tl.int64) * x_stride
        total = tl.zeros([BLOCK_N], tl.float32)
    else:
        m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        x_rows = x_ptr + (m % M).to(tl.int64) * x_stride
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = k * per_program
    last = tl.minimum(first + per_program, full)
    for PART in tl.static_range(0, len(PARTS), 7):
        total = _section(
            total, x_rows, weight_rows, scale_rows, first, last,
            GROUP, PARTS[PART + 5], PART, GROUP, GROUP_BYTES, PARTS, DIGITS, VECTOR, TWICE,
        )  # fmt: skip
        if TAIL > 0:
            # The last program's, as a section of its own.
            end = full + (k == tl.num_programs(1) - 1).to(tl.int32)
            total = _section(
                total, x_rows, weight_rows, scale_rows, full, end,
                TAIL, PARTS[PART + 6], PART, GROUP, GROUP_BYTES, PARTS, DIGITS, VECTOR, TWICE,
            )  # fmt: skip
    if VECTOR:
        tl.store(out_ptrs + m.to(tl.int64) * N, total.to(out_ptr.dtype.element_ty), mask=n < N)
    else:
        rows = m.to(tl.int64)[:, None] * N
        mask = (m < M)[:, None] & (n < N)[None, :]
        tl.store(out_ptrs[None, :] + rows, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_kernel(partial_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, programs: tl.tensor, BLOCK: tl.constexpr):
    """Sums what the programs of a row have found, always in the same order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(programs):
        total += tl.load(partial_ptr + place, mask=place < size, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=place < size)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    layout: Layout,
    *,
    block_m: int,
    block_n: int,
    programs: int | None = None,
) -> Tensor:
    """
    Multiplies by packed weights without writing them out.

    Args:
        x (`torch.Tensor`):
            `(M, in_features)`.
        weight (`torch.Tensor`):
            uint8 `(N, row_bytes)`.
        scale (`torch.Tensor`):
            `(N, groups, num_scales)`.
        layout (`Layout`):
            Of the weight.
        block_m (`int`):
            Rows of activations of a program: 1, or a power of two from 16.
        block_n (`int`):
            Output features of a program, a power of two from 16.
        programs (`int`, *optional*):
            Into how many programs the groups of a row are divided. Defaults to what fills the device.

    Returns:
        `torch.Tensor`: `(M, N)`.
    """
    (rows, in_features), out_features = x.shape, len(weight)
    full = in_features // layout.group_size
    grid_m, grid_n = triton.cdiv(rows, block_m), triton.cdiv(out_features, block_n)
    if programs is None:
        programs = max(1, min(PROGRAMS * _processors(x.device) // (grid_m * grid_n), full // 2))
    split = programs > 1
    out = torch.empty(rows, out_features, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    partial = out.new_empty(programs, rows, out_features, dtype=torch.float32) if split else out
    twice = x.dtype == torch.bfloat16 and rows <= EXACT_ROWS
    warps, stages = _warps_and_stages(block_m)
    with torch.cuda.device_of(x):
        _matmul_kernel[grid_n, programs, grid_m](
            x, weight, scale, partial, rows, out_features, full, triton.cdiv(full, programs),
            x.stride(0), weight.stride(0), scale.stride(0), *constants(layout), block_m, block_n, twice,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if split:
            _sum_kernel[(triton.cdiv(out.numel(), 256),)](partial, out, out.numel(), programs, 256)
    return out.to(x.dtype)


def _warps_and_stages(block_m: int) -> tuple[int, int]:
    return (8, 2) if block_m >= 64 else (4, 3)


def _block_n(out_features: int, layout: Layout) -> int:
    # Fewer rows for a long group, of which a program holds all products, and where there would be few programs.
    longest = max(part.bytes(layout.group_size) for part in layout.parts)
    return max(16, min(64 if out_features >= 2048 else 32, 4096 // triton.next_power_of_2(longest)))


def matmul(input: Tensor, weight: Tensor, weight_scale: Tensor, layout: Layout) -> Tensor:
    """
    Returns `input @ w.T` for a packed matrix w.

    Args:
        input (`torch.Tensor`):
            float32, bfloat16 or float16 `(..., in_features)`. Products are summed in float32.
        weight (`torch.Tensor`):
            uint8 `(out_features, row_bytes)`.
        weight_scale (`torch.Tensor`):
            `(out_features, groups, num_scales)`.
        layout (`Layout`):
            What the bytes mean; every part has a [`recipe`].

    Returns:
        `torch.Tensor`: `(..., out_features)` of the type of `input`.
    """
    x = input.reshape(-1, layout.in_features)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, out_features = len(x), len(weight)
    tiled = x.dtype != torch.float32 and layout.group_size <= MAX_TILE
    if rows * out_features == 0:
        out = x.new_zeros(rows, out_features)
    elif rows == 1 or (rows <= MAX_VECTORS and not tiled):
        out = multiply(x, weight, weight_scale, layout, block_m=1, block_n=_block_n(out_features, layout))
    elif rows <= MAX_ROWS and tiled:
        block_m = min(max(16, triton.next_power_of_2(rows)), 128)
        out = multiply(x, weight, weight_scale, layout, block_m=block_m, block_n=_block_n(out_features, layout))
    else:
        out = x @ dequantize(weight, weight_scale, layout, x.dtype).T
    return out.view(*input.shape[:-1], out_features)
