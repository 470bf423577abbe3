"""PTQTP's solver in Triton: every group of weights in the registers of a few threads.

The literal algorithm: all 3^K sums of scales are tried for every weight. There is no sorted order to set up, and a
GPU's arithmetic is cheaper than its memory. Scales, sums and distances are float64 and multiplications are not fused
with additions, so the steps are those of the reference. What differs is the order in which a sum over a group is
taken, in the last bits: trits agree except where two choices are equally good to 1e-15.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rb.quantizers.kernels.layout import sections
from hf_rb.quantizers.ptqtp.options import SolverOptions


__all__ = ["encode", "fit"]

# Weights that a warp works on.
TILE = 256

# Places in `params_ptr`, from which `_fit_kernel` reads numbers in float64: an argument of a kernel would not be. The
# direction is that of tied scales; every start has three shares.
TOL, RIDGE_INIT, RIDGE_MAX, KAPPA, REACH, DIRECTION, STARTS = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5, 7))


@triton.jit
def _nearest(w: tl.tensor, a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, PLANES: tl.constexpr):
    """The first combination of trits, in lexicographic order, with the smallest distance; and that distance."""
    distance = tl.abs(w + (a0 + a1 + a2)[:, None])
    code = tl.zeros(w.shape, tl.int32)
    for i in tl.static_range(1, 3**PLANES):
        level = a0 * (i // 3 ** (PLANES - 1) - 1)
        if PLANES > 1:
            level += a1 * (i // 3 ** (PLANES - 2) % 3 - 1)
        if PLANES > 2:
            level += a2 * (i % 3 - 1)
        other = tl.abs(w - level[:, None])
        code = tl.where(other < distance, i, code)
        distance = tl.minimum(other, distance)
    return code, distance


@triton.jit
def _signed_sum(w: tl.tensor, trit: tl.tensor):
    return tl.sum(tl.where(trit > 0, w, tl.where(trit < 0, -w, 0.0)), axis=1)


@triton.jit
def _trit_sums(w: tl.tensor, there: tl.tensor, a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, PLANES: tl.constexpr):
    """S'S and S'w of the nearest trits: s00, s01, s02, s11, s12, s22, b0, b1, b2 (zeros for planes that are none)."""
    code, _ = _nearest(w, a0, a1, a2, PLANES)
    t0 = tl.where(there, code // 3 ** (PLANES - 1) - 1, 0)
    s00 = tl.sum(t0 * t0, axis=1).to(tl.float64)
    b0 = _signed_sum(w, t0)
    zero = tl.zeros_like(b0)
    s01, s02, s11, s12, s22, b1, b2 = zero, zero, zero, zero, zero, zero, zero
    if PLANES > 1:
        t1 = tl.where(there, code // 3 ** (PLANES - 2) % 3 - 1, 0)
        s01 = tl.sum(t0 * t1, axis=1).to(tl.float64)
        s11 = tl.sum(t1 * t1, axis=1).to(tl.float64)
        b1 = _signed_sum(w, t1)
    if PLANES > 2:
        t2 = tl.where(there, code % 3 - 1, 0)
        s02 = tl.sum(t0 * t2, axis=1).to(tl.float64)
        s12 = tl.sum(t1 * t2, axis=1).to(tl.float64)  # pyrefly: ignore[unbound-name]  (`PLANES` is a constant)
        s22 = tl.sum(t2 * t2, axis=1).to(tl.float64)
        b2 = _signed_sum(w, t2)
    return s00, s01, s02, s11, s12, s22, b0, b1, b2


@triton.jit
def _solve(
    s00: tl.tensor,
    s01: tl.tensor,
    s02: tl.tensor,
    s11: tl.tensor,
    s12: tl.tensor,
    s22: tl.tensor,
    b0: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    ridge: tl.tensor,
    PLANES: tl.constexpr,
):
    """Solves (S'S + ridge I) a = S'w through the adjugate, the ridge apart; returns a and the condition number."""
    none = tl.zeros_like(b0)
    if PLANES == 1:
        return b0 / (s00 + ridge), none, none, none + 1
    elif PLANES == 2:
        determinant = (s00 * s11 - s01 * s01) + ridge * (s00 + s11) + ridge * ridge
        a0 = ((s11 * b0 - s01 * b1) + ridge * b0) / determinant
        a1 = ((s00 * b1 - s01 * b0) + ridge * b1) / determinant
        d0, d1 = s00 + ridge, s11 + ridge
        return a0, a1, none, (d0 * d0 + d1 * d1 + 2 * (s01 * s01)) / tl.abs(determinant)
    else:
        c00, c01, c02 = s11 * s22 - s12 * s12, s02 * s12 - s01 * s22, s01 * s12 - s02 * s11
        c11, c12, c22 = s00 * s22 - s02 * s02, s01 * s02 - s00 * s12, s00 * s11 - s01 * s01
        trace, square = s00 + s11 + s22, ridge * ridge
        determinant = s00 * c00 + s01 * c01 + s02 * c02
        determinant = determinant + ridge * (c00 + c11 + c22) + square * trace + square * ridge
        l0 = trace * b0 - s00 * b0 - s01 * b1 - s02 * b2
        l1 = trace * b1 - s01 * b0 - s11 * b1 - s12 * b2
        l2 = trace * b2 - s02 * b0 - s12 * b1 - s22 * b2
        a0 = (c00 * b0 + c01 * b1 + c02 * b2 + ridge * l0 + square * b0) / determinant
        a1 = (c01 * b0 + c11 * b1 + c12 * b2 + ridge * l1 + square * b1) / determinant
        a2 = (c02 * b0 + c12 * b1 + c22 * b2 + ridge * l2 + square * b2) / determinant
        norm = _squares(s00 + ridge, s01, s02, s11 + ridge, s12, s22 + ridge)
        e00, e11, e22 = (
            c00 + ridge * (trace - s00) + square,
            c11 + ridge * (trace - s11) + square,
            c22 + ridge * (trace - s22) + square,
        )
        inverse_norm = _squares(e00, c01 - ridge * s01, c02 - ridge * s02, e11, c12 - ridge * s12, e22)
        return a0, a1, a2, tl.sqrt(norm * inverse_norm) / tl.abs(determinant)


@triton.jit
def _squares(m00: tl.tensor, m01: tl.tensor, m02: tl.tensor, m11: tl.tensor, m12: tl.tensor, m22: tl.tensor):
    return m00 * m00 + m11 * m11 + m22 * m22 + 2 * (m01 * m01 + m02 * m02 + m12 * m12)


@triton.jit
def _norm(a0: tl.tensor, a1: tl.tensor, a2: tl.tensor):
    return tl.sqrt(a0 * a0 + a1 * a1 + a2 * a2)


@triton.jit
def _fit_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    params_ptr: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    stride: tl.tensor,
    max_iter: tl.tensor,
    LENGTH: tl.constexpr,
    PLANES: tl.constexpr,
    TIED: tl.constexpr,
    RELATIVE: tl.constexpr,
    PAPER_START: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scales of `size` groups, `groups` of which are neighbours in a row."""
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = (index < size)[:, None] & (column < LENGTH)[None, :]
    place = (index // groups * stride + index % groups * LENGTH)[:, None] + column[None, :]
    w = tl.load(weight_ptr + place, mask=there, other=0.0).to(tl.float64)

    zero = tl.zeros([BLOCK], tl.float64)
    one = tl.full([BLOCK], 1.0, tl.float64)
    squares = tl.sum(w * w, axis=1)
    best0, best1, best2, best_loss = zero, zero, zero, zero
    for run in range(RUNS):
        if run < PAPER_START:
            # t_1 = ... = t_K = sign(w), where the sign of zero is +1
            a0, a1, a2 = one, one if PLANES > 1 else zero, one if PLANES > 2 else zero
            count, total = one * LENGTH, tl.sum(tl.abs(w), axis=1)
            s00, s01, s02, s11, s12, s22, b0, b1, b2 = count, count, count, count, count, count, total, total, total
        else:
            share = params_ptr + STARTS + 3 * (run - PAPER_START)
            top = tl.minimum(tl.load(params_ptr + REACH) * tl.sqrt(squares / LENGTH), tl.max(tl.abs(w), axis=1))
            # Sums of scales in the ratio 4:2:1 coincide, exactly so if the scales have few bits.
            a0 = (tl.load(share) * top).to(tl.float32).to(tl.float64)
            a1 = (tl.load(share + 1) * top).to(tl.float32).to(tl.float64)
            a2 = (tl.load(share + 2) * top).to(tl.float32).to(tl.float64)
            s00, s01, s02, s11, s12, s22, b0, b1, b2 = _trit_sums(w, there, a0, a1, a2, PLANES)
        ridge = zero + tl.load(params_ptr + RIDGE_INIT)
        moving = index < size
        step = 0
        while (step < max_iter) & (tl.max(moving.to(tl.int32), axis=0) > 0):
            n0, n1, n2, ridge = _ridge_step(s00, s01, s02, s11, s12, s22, b0, b1, b2, ridge, params_ptr, PLANES, TIED)
            moved = _norm(n0 - a0, n1 - a1, n2 - a2)
            limit = zero + tl.load(params_ptr + TOL)
            if RELATIVE:
                limit *= _norm(n0, n1, n2)
            # A group that has converged keeps its scales.
            a0, a1, a2 = tl.where(moving, n0, a0), tl.where(moving, n1, a1), tl.where(moving, n2, a2)
            moving = moving & (moved >= limit) & (moved > 0)
            s00, s01, s02, s11, s12, s22, b0, b1, b2 = _trit_sums(w, there, a0, a1, a2, PLANES)
            step += 1
        if RUNS > 1:
            s00, s01, s02, s11, s12, s22, b0, b1, b2 = _trit_sums(w, there, a0, a1, a2, PLANES)
            loss = a0 * a0 * s00 + a1 * a1 * s11 + a2 * a2 * s22 - 2 * (a0 * b0 + a1 * b1 + a2 * b2)
            loss += 2 * (a0 * a1 * s01 + a0 * a2 * s02 + a1 * a2 * s12)
            # Two starts that end in one place differ by rounding.
            better = (loss < best_loss - 1e-12 * squares) | (run == 0)
            best_loss = tl.where(better, loss, best_loss)
            a0, a1, a2 = tl.where(better, a0, best0), tl.where(better, a1, best1), tl.where(better, a2, best2)
        best0, best1, best2 = a0, a1, a2
    tl.store(scale_ptr + index * PLANES, best0, mask=index < size)
    if PLANES > 1:
        tl.store(scale_ptr + index * PLANES + 1, best1, mask=index < size)
    if PLANES > 2:
        tl.store(scale_ptr + index * PLANES + 2, best2, mask=index < size)


@triton.jit
def _ridge_step(
    s00: tl.tensor,
    s01: tl.tensor,
    s02: tl.tensor,
    s11: tl.tensor,
    s12: tl.tensor,
    s22: tl.tensor,
    b0: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    ridge: tl.tensor,
    params_ptr: tl.tensor,
    PLANES: tl.constexpr,
    TIED: tl.constexpr,
):
    """The scales, with a larger ridge where the condition number asks for it; and the ridge."""
    if TIED:
        d0, d1 = tl.load(params_ptr + DIRECTION), tl.load(params_ptr + DIRECTION + 1)
        along = (s00 * d0 + s01 * d1) * d0 + (s01 * d0 + s11 * d1) * d1
        a = (b0 * d0 + b1 * d1) / (along + ridge)
        return a * d0, a * d1, tl.zeros_like(a), ridge
    else:
        a0, a1, a2, kappa = _solve(s00, s01, s02, s11, s12, s22, b0, b1, b2, ridge, PLANES)
        threshold = tl.load(params_ptr + KAPPA)
        ill = kappa >= threshold
        grown = tl.minimum(ridge * tl.sqrt(kappa / threshold), tl.load(params_ptr + RIDGE_MAX))
        ridge = tl.where(ill, grown, ridge)
        c0, c1, c2, _ = _solve(s00, s01, s02, s11, s12, s22, b0, b1, b2, ridge, PLANES)
        return tl.where(ill, c0, a0), tl.where(ill, c1, a1), tl.where(ill, c2, a2), ridge


@triton.jit
def _encode_part(
    weight_rows: tl.tensor,
    packed_rows: tl.tensor,
    inside: tl.tensor,
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    LENGTH: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Packs the planes from `PLANE` on that share a code of `BITS`; returns the squared errors and the squared
    norms.
    """
    BYTES: tl.constexpr = (LENGTH * BITS + 7) // 8
    j = tl.arange(0, triton.next_power_of_2(BYTES))
    packed = tl.zeros([a0.shape[0], j.shape[0]], tl.int32)
    error, norm = tl.zeros_like(a0), tl.zeros_like(a0)
    for i in tl.static_range(8 // BITS):
        there = inside[:, None] & ((j < BYTES) & (i * BYTES + j < LENGTH))[None, :]
        w = tl.load(weight_rows[:, None] + (i * BYTES + j)[None, :], mask=there, other=0.0).to(tl.float64)
        code, distance = _nearest(w, a0, a1, a2, PLANES)
        error += tl.sum(tl.where(there, distance * distance, 0.0), axis=1)
        norm += tl.sum(w * w, axis=1)
        digit = _digit(code, a0 if PLANE == 0 else a2, there, PLANE, PLANES)
        if BITS == 4:
            digit = 3 * digit + _digit(code, a1, there, PLANE + 1, PLANES)
        packed |= digit << (i * BITS)
    tl.store(packed_rows[:, None] + j[None, :], packed.to(tl.uint8), mask=inside[:, None] & (j < BYTES)[None, :])
    return error, norm


@triton.jit
def _digit(code: tl.tensor, scale: tl.tensor, there: tl.tensor, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """A plane's trit plus one: 1 outside the group, and in a plane whose scale is zero."""
    return tl.where(there & (scale != 0)[:, None], code // 3 ** (PLANES - 1 - PLANE) % 3, 1)


@triton.jit
def _encode_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    stride: tl.tensor,
    packed_stride: tl.tensor,
    LENGTH: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Packs the best trits for given scales; `sums_ptr` gets the squared error and the squared norm of every group."""
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = index < size
    weight_rows = weight_ptr + index // groups * stride + index % groups * LENGTH
    packed_rows = packed_ptr + index // groups * packed_stride + index % groups * GROUP_BYTES
    scale_ptrs = scale_ptr + index * PLANES
    a0 = tl.load(scale_ptrs, mask=inside, other=0.0).to(tl.float64)
    a1, a2 = tl.zeros_like(a0), tl.zeros_like(a0)
    if PLANES > 1:
        a1 = tl.load(scale_ptrs + 1, mask=inside, other=0.0).to(tl.float64)
    if PLANES > 2:
        a2 = tl.load(scale_ptrs + 2, mask=inside, other=0.0).to(tl.float64)
    # Planes 0 and 1 share a code of 4 bits, a plane that is left over has one of 2 bits.
    error, norm = _encode_part(weight_rows, packed_rows, inside, a0, a1, a2, LENGTH, 4 if PLANES > 1 else 2, 0, PLANES)
    if PLANES == 3:
        _encode_part(weight_rows, packed_rows + (LENGTH + 1) // 2, inside, a0, a1, a2, LENGTH, 2, 2, PLANES)
    tl.store(sums_ptr + index, error, mask=inside)
    tl.store(sums_ptr + size + index, norm, mask=inside)


def fit(weight: Tensor, group_size: int, options: SolverOptions) -> Tensor:
    """
    Returns the scales of [`~hf_rb.quantizers.ptqtp.solve`] before they are rounded.

    Args:
        weight (`torch.Tensor`):
            `(out_features, in_features)`, floating.
        group_size (`int`):
            Neighbours in a row that share their scales.
        options ([`~hf_rb.quantizers.ptqtp.options.SolverOptions`]):
            How the two half-steps alternate.

    Returns:
        `torch.Tensor`: float64 `(out_features, groups, planes)`, in every group descending and not negative.

    Raises:
        ValueError: The weight has a NaN or an infinite value.
    """
    if not weight.isfinite().all():
        raise ValueError("The weight has a NaN or an infinite value.")
    direction = options.direction.tolist() if options.direction is not None else [0.0, 0.0]
    params = [options.tol, options.ridge_init, options.ridge_max, options.kappa_threshold, options.reach, *direction]
    for start in filter(None, options.starts):
        params += (*start, 0.0, 0.0)[:3]
    params = torch.tensor(params, dtype=torch.float64, device=weight.device)
    scales = []
    for part, groups, length in _sections(weight, group_size):
        found = torch.empty(len(part), groups, options.planes, dtype=torch.float64, device=weight.device)
        size, width = len(part) * groups, triton.next_power_of_2(length)
        block = max(1, TILE // width)  # groups of a program
        with torch.cuda.device_of(weight):
            _fit_kernel[(triton.cdiv(size, block),)](
                part, found, params, size, groups, part.stride(0), options.max_iter, length, options.planes,
                options.direction is not None, options.relative, int(None in options.starts), len(options.starts),
                block, width, num_warps=_warps(width), enable_fp_fusion=False,
            )  # fmt: skip
        scales.append(found)
    return torch.cat(scales, dim=1).abs().sort(-1, descending=True).values


def encode(weight: Tensor, scales: Tensor, group_size: int, row_bytes: int) -> tuple[Tensor, float, float]:
    """
    Packs the best trits for given scales in the kernels' layout.

    Args:
        weight (`torch.Tensor`):
            `(out_features, in_features)`, floating.
        scales (`torch.Tensor`):
            `(out_features, groups, planes)`, any floating type.
        group_size (`int`):
            Neighbours in a row that share their scales.
        row_bytes (`int`):
            Bytes of a packed row.

    Returns:
        `tuple[torch.Tensor, float, float]`: uint8 `(out_features, row_bytes)`, the squared error and the squared norm
        of the weight.
    """
    packed = torch.empty(len(weight), row_bytes, dtype=torch.uint8, device=weight.device)
    planes, group, offset = scales.shape[-1], 0, 0
    total: Any = 0  # a tensor from the first part on
    for part, groups, length in _sections(weight, group_size):
        part_scales = scales[:, group : group + groups].contiguous()
        size, group_bytes = len(part) * groups, -(-length // 2) * (planes // 2) + -(-length // 4) * (planes % 2)
        width = triton.next_power_of_2(length)
        block = max(1, TILE // width)
        sums = torch.empty(2, size, dtype=torch.float64, device=weight.device)
        with torch.cuda.device_of(weight):
            _encode_kernel[(triton.cdiv(size, block),)](
                part, part_scales, packed[:, offset:], sums, size, groups, part.stride(0), row_bytes,
                length, planes, group_bytes, block, num_warps=_warps(width), enable_fp_fusion=False,
            )  # fmt: skip
        total = total + sums.sum(1)
        group, offset = group + groups, offset + groups * group_bytes
    return packed, *total.tolist()


def _warps(width: int) -> int:
    return min(max(1, width // TILE), 16)


def _sections(weight: Tensor, group_size: int) -> list[tuple[Tensor, int, int]]:
    """The full groups of a matrix and its short last ones, as views, with their number in a row and their length."""
    weight = weight.detach()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return [
        (weight[:, start : start + groups * length], groups, length)
        for start, groups, length in sections(weight.shape[1], group_size)
    ]
