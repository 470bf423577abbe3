"""Packed weights written out as numbers, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.kernels.triton.digits import INTERPRETED, coefficients, constants, weights


__all__ = ["dequantize"]


@triton.jit
def _group_part(
    weight_rows: tl.tensor,
    scale_rows: tl.tensor,
    place: tl.tensor,
    LENGTH: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Contribution of one part to the weights at `place` of a group."""
    BITS: tl.constexpr = PARTS[PART]
    BYTES: tl.constexpr = (LENGTH * BITS + 7) // 8
    weight_ptrs = weight_rows[:, None] + (place % BYTES)[None, :]
    packed = tl.load(weight_ptrs, mask=(place < LENGTH)[None, :], other=0).to(tl.int32)
    code = (packed >> (place // BYTES * BITS)[None, :]) & ((1 << BITS) - 1) | 0x4B000000
    a, b, c = coefficients(scale_rows, PARTS[PART + 3], PARTS[PART + 4], DIGITS)
    return weights(code, a[:, None], b[:, None], c[:, None], PARTS[PART + 1], PARTS[PART + 2], 1)


@triton.jit
def _dequantize_group(
    out_rows: tl.tensor,
    weight_rows: tl.tensor,
    scale_rows: tl.tensor,
    mask: tl.tensor,
    LENGTH: tl.constexpr,
    OFFSET: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
):
    """Weight by weight: here the parts meet, and their slices have different lengths. `OFFSET` is a field of
    `PARTS`.
    """
    place = tl.arange(0, triton.next_power_of_2(LENGTH))
    total = tl.zeros([out_rows.shape[0], place.shape[0]], tl.float32)
    for PART in tl.static_range(0, len(PARTS), 7):
        total += _group_part(weight_rows + PARTS[PART + OFFSET], scale_rows, place, LENGTH, PART, PARTS, DIGITS)
    mask = mask[:, None] & (place < LENGTH)[None, :]
    tl.store(out_rows[:, None] + place[None, :], total.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    full: tl.tensor,
    weight_stride: tl.tensor,
    scale_stride: tl.tensor,
    out_stride: tl.tensor,
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


def dequantize(weight: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns the matrix `(N, in_features)`, summed in float32."""
    out_type = torch.float32 if INTERPRETED else dtype
    out = torch.empty(len(weight), layout.in_features, dtype=out_type, device=weight.device)
    full = layout.in_features // layout.group_size
    block_n = max(1, 1024 // triton.next_power_of_2(layout.group_size))
    with torch.cuda.device_of(weight):
        _dequantize_kernel[triton.cdiv(len(weight), block_n), layout.groups](
            weight, scale, out, len(weight), full,
            weight.stride(0), scale.stride(0), out.stride(0), *constants(layout), block_n,
        )  # fmt: skip
    return out.to(dtype)
