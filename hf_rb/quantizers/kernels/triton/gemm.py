r"""Multiplication by packed weights, in Triton.

**Codes to numbers.** A table look-up for every weight would cost more than the multiplication. The bases that occur are those
of digits, so a code c is taken apart by arithmetic:

    h = floor(c / radix)        basis_k[c] = alpha_k c + beta_k h + gamma_k        (integers; found by `recipe`)

and with the scales s_k of a group, which its weights share, a weight is

    w = A c + B h + C        A = sum_k s_k alpha_k,    B = sum_k s_k beta_k,    C = sum_k s_k gamma_k

With scales in float16 all of this is exact in float32, unless the scales of a group are more than a factor 2^9 apart.
Integers become floats without a conversion instruction: the number 2^23 + c has the bits of c at the end of its mantissa.

**Where a byte's weights are.** Byte j of a group of n weights holds the weights j, j + q, j + 2q, ... with q = ceil(n / codes
in a byte). One shift of a tile of neighbouring bytes is therefore a tile of neighbouring weights, a *slice*, and its
activations are neighbours too. The parts of a layout add up: each goes through the same loop by itself.

Shapes: M rows of activations, N output features, Q bytes that a part has in a group.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout, Part


__all__ = ["dequantize", "matmul", "multiply", "recipe"]

# Up to this many rows of activations the weights are decoded as they are multiplied, above it once for all rows.
MAX_ROWS = 256
# `tl.dot` takes the weights of a whole group, of at most this length, and 16-bit types: others have no tensor cores. What it does not
# take is multiplied row by row, up to so many rows.
MAX_TILE = 128
MAX_VECTORS = 8
# The longest group that is taken at all.
MAX_GROUP = 1024
# Programs for every multiprocessor of the device; with fewer, the groups of a row are divided among several.
PROGRAMS = 4

# Up to this many rows of bfloat16 activations the weights are not rounded to bfloat16: memory, not arithmetic, takes the time.
EXACT_ROWS = 64

# Triton's interpreter multiplies the bits of bfloat16 and rounds to it wrongly. Under it everything is float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Recipe(NamedTuple):
    """A basis in digits: `basis[k][c] = alpha * (c - shift) + beta * floor(c / radix) + gamma` with a row for every k."""

    radix: int  # 0 where no digit is needed
    shift: int
    rows: tuple[tuple[int, int, int], ...]

    def value(self, row: int, code: int) -> int:
        alpha, beta, gamma = self.rows[row]
        return alpha * (code - self.shift) + beta * (code // self.radix if self.radix else 0) + gamma


@lru_cache
def recipe(part: Part) -> Recipe | None:
    """Writes a basis in digits; `None` if it cannot be."""
    for radix in (0, *range(2, len(part.basis[0]))):
        found = _in_digits(part.basis, radix)
        if all(found.value(k, code) == value for k, row in enumerate(part.basis) for code, value in enumerate(row)):
            return found
    return None


def _in_digits(basis: tuple[tuple[int, ...], ...], radix: int) -> Recipe:
    rows, shift = [], max(radix - 1, 0) // 2
    for row in basis:
        alpha = row[1] - row[0] if len(row) > 1 else 0
        rows.append((alpha, row[radix] - row[0] - alpha * radix if radix else 0, row[0] + alpha * shift))
    return Recipe(radix, shift, tuple(rows))


class _Constants(NamedTuple):
    """
    What the kernels are compiled for. The tuples are flat because compiled code indexes only such.

    `PARTS` has for every part: bits, radix, shift, its first scale, the end of its scales, its offset in a group and in the last
    group. `DIGITS` has alpha, beta and gamma for every scale of a group. `TAIL` is the length of a short last group.
    """

    GROUP: int
    TAIL: int
    GROUP_BYTES: int
    PARTS: tuple[int, ...]
    DIGITS: tuple[int, ...]


@lru_cache
def _constants(layout: Layout) -> _Constants:
    tail = layout.in_features % layout.group_size
    parts, digits, offset, tail_offset = [], [], 0, 0
    for part in layout.parts:
        radix, shift, rows = recipe(part)
        first = len(digits) // 3
        parts += [part.bits, radix, shift, first, first + len(rows), offset, tail_offset]
        digits += [number for row in rows for number in row]
        offset += part.bytes(layout.group_size)
        tail_offset += part.bytes(tail)
    return _Constants(layout.group_size, tail, offset, tuple(parts), tuple(digits))


@triton.jit
def _coefficients(scale_ptrs, FIRST: tl.constexpr, END: tl.constexpr, DIGITS: tl.constexpr):
    """A, B and C of a group for every row; `scale_ptrs` point to its first scale."""
    a = tl.zeros(scale_ptrs.shape, tl.float32)
    b = tl.zeros(scale_ptrs.shape, tl.float32)
    c = tl.zeros(scale_ptrs.shape, tl.float32)
    for k in tl.static_range(FIRST, END):
        scale = tl.load(scale_ptrs + k).to(tl.float32)
        a += scale * DIGITS[3 * k]
        b += scale * DIGITS[3 * k + 1]
        c += scale * DIGITS[3 * k + 2]
    return a, b, c


@triton.jit
def _weights(code, a, b, c, RADIX: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr):
    """The weights, float32, of the bits of 2^23 + `UNIT` * code."""
    code = code.to(tl.float32, bitcast=True) - (8388608.0 + SHIFT * UNIT)
    weight = a * (1.0 / UNIT) * code + c
    if RADIX > 0:
        # Adding 1.5 * 2^23 rounds. `SHIFT` and the factor below 1 turn the rounding into a floor.
        weight += b * ((code * (0.984375 / (RADIX * UNIT)) + 12582912.0) - 12582912.0)
    return weight


@triton.jit
def _load(ptrs, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _dot(x, weight, acc):
    """Adds `x @ weight.T`, with the weight rounded to the type of `x`."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(weight), acc)
    else:
        return tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee")


@triton.jit
def _dot_twice(x, weight, acc):
    """Adds `x @ weight.T` for bfloat16 `x` in two halves: the 8 leading bits of the weight, and the rest rounded to 8 bits."""
    high = (weight.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return _dot(x, weight - high, _dot(x, high, acc))


@triton.jit
def _section(
    total,
    x_rows,
    weight_rows,
    scale_rows,
    first,
    last,
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

    A single row of activations (`VECTOR`, `total` is (N,)) is multiplied in float32, more (`total` is (M, N)) by `tl.dot`.
    `x_rows`, `weight_rows` and `scale_rows` point to where the rows begin.
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
        a, b, c = _coefficients(scale_ptrs, PARTS[PART + 3], PARTS[PART + 4], DIGITS)
        for i in tl.static_range(8 // BITS):
            # The code stays where it is in its byte.
            code = packed & (0x4B000000 + (((1 << BITS) - 1) << (i * BITS)))
            weight = _weights(
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
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    full,
    per_program,
    x_stride,
    weight_stride,
    scale_stride,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWICE: tl.constexpr,
):
    """`out[k, m, n]`: the sum over the `per_program` groups that are program k's, out of `full` whole ones in a row."""
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
def _sum_kernel(partial_ptr, out_ptr, size, programs, BLOCK: tl.constexpr):
    """Sums what the programs of a row have found, always in the same order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(programs):
        total += tl.load(partial_ptr + place, mask=place < size, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _group_part(
    weight_rows,
    scale_rows,
    place,
    LENGTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """What one part contributes to the weights at `place` of a group."""
    BITS: tl.constexpr = PARTS[PART]
    BYTES: tl.constexpr = (LENGTH * BITS + 7) // 8
    weight_ptrs = weight_rows[:, None] + (place % BYTES)[None, :]
    packed = tl.load(weight_ptrs, mask=(place < LENGTH)[None, :], other=0).to(tl.int32)
    code = (packed >> (place // BYTES * BITS)[None, :]) & ((1 << BITS) - 1) | 0x4B000000
    a, b, c = _coefficients(scale_rows, PARTS[PART + 3], PARTS[PART + 4], DIGITS)
    return _weights(code, a[:, None], b[:, None], c[:, None], PARTS[PART + 1], PARTS[PART + 2], 1)


@triton.jit
def _dequantize_group(
    out_rows,
    weight_rows,
    scale_rows,
    mask,
    LENGTH: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Weight by weight: here the parts meet, and their slices have different lengths. `OFFSET` is a field of `PARTS`."""
    place = tl.arange(0, triton.next_power_of_2(LENGTH))
    total = tl.zeros([out_rows.shape[0], place.shape[0]], tl.float32)
    for PART in tl.static_range(0, len(PARTS), 7):
        total += _group_part(weight_rows + PARTS[PART + OFFSET], scale_rows, place, LENGTH, PART, PARTS, DIGITS)
    mask = mask[:, None] & (place < LENGTH)[None, :]
    tl.store(out_rows[:, None] + place[None, :], total.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    N,
    full,
    weight_stride,
    scale_stride,
    out_stride,
    GROUP: tl.constexpr,
    TAIL: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n, g = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    out_rows = out_ptr + n.to(tl.int64) * out_stride + g * GROUP
    weight_rows = weight_ptr + (n % N).to(tl.int64) * weight_stride + g * GROUP_BYTES
    scale_rows = scale_ptr + (n % N).to(tl.int64) * scale_stride + g * (len(DIGITS) // 3)
    if g < full:
        _dequantize_group(out_rows, weight_rows, scale_rows, n < N, GROUP, 5, PARTS, DIGITS)
    elif TAIL > 0:
        _dequantize_group(out_rows, weight_rows, scale_rows, n < N, TAIL, 6, PARTS, DIGITS)


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
            x.stride(0), weight.stride(0), scale.stride(0), *_constants(layout), block_m, block_n, twice,
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


def dequantize(weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns the matrix `(N, in_features)`, summed in float32."""
    out_type = torch.float32 if INTERPRETED else dtype
    out = torch.empty(len(weight), layout.in_features, dtype=out_type, device=weight.device)
    full = layout.in_features // layout.group_size
    block_n = max(1, 1024 // triton.next_power_of_2(layout.group_size))
    with torch.cuda.device_of(weight):
        _dequantize_kernel[triton.cdiv(len(weight), block_n), layout.groups](
            weight, scale, out, len(weight), full, weight.stride(0), scale.stride(0), out.stride(0), *_constants(layout), block_n
        )  # fmt: skip
    return out.to(dtype)
