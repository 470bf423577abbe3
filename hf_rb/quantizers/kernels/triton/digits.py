r"""Codes to numbers, in Triton.

A table look-up for every weight would cost more than the multiplication. The bases that occur are those
of digits, so a code c is taken apart by arithmetic:

    h = floor(c / radix)        basis_k[c] = alpha_k c + beta_k h + gamma_k        (integers; found by `recipe`)

and with the scales s_k of a group, which its weights share, a weight is

    w = A c + B h + C        A = sum_k s_k alpha_k,    B = sum_k s_k beta_k,    C = sum_k s_k gamma_k

With scales in float16 all of this is exact in float32, unless the scales of a group are more than a factor 2^9 apart.
Integers become floats without a conversion instruction: the number 2^23 + c has the bits of c at the end of its
mantissa.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from hf_rb.quantizers.kernels.layout import Layout, Part


__all__ = ["INTERPRETED", "Constants", "Recipe", "coefficients", "constants", "recipe", "weights"]

# Triton's interpreter multiplies the bits of bfloat16 and rounds to it wrongly. Under it everything is float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Recipe(NamedTuple):
    """A basis in digits: `basis[k][c] = alpha * (c - shift) + beta * floor(c / radix) + gamma` with a row for every
    k.
    """

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


class Constants(NamedTuple):
    """
    Constants that the kernels are compiled for. The tuples are flat because compiled code indexes only such.

    `PARTS` has for every part: bits, radix, shift, its first scale, the end of its scales, its offset in a group and
    in the last group. `DIGITS` has alpha, beta and gamma for every scale of a group. `TAIL` is the length of a short
    last group.
    """

    GROUP: int
    TAIL: int
    GROUP_BYTES: int
    PARTS: tuple[int, ...]
    DIGITS: tuple[int, ...]


@lru_cache
def constants(layout: Layout) -> Constants:
    tail = layout.in_features % layout.group_size
    parts, digits, offset, tail_offset = [], [], 0, 0
    for part in layout.parts:
        found = recipe(part)
        if found is None:
            raise ValueError(f"The kernels for GPUs cannot write the levels {part.basis} in digits.")
        radix, shift, rows = found
        first = len(digits) // 3
        parts += [part.bits, radix, shift, first, first + len(rows), offset, tail_offset]
        digits += [number for row in rows for number in row]
        offset += part.bytes(layout.group_size)
        tail_offset += part.bytes(tail)
    return Constants(layout.group_size, tail, offset, tuple(parts), tuple(digits))


@triton.jit
def coefficients(scale_ptrs: tl.tensor, FIRST: tl.constexpr, END: tl.constexpr, DIGITS: tl.constexpr):
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
def weights(
    code: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    RADIX: tl.constexpr,
    SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The weights, float32, of the bits of 2^23 + `UNIT` * code."""
    code = code.to(tl.float32, bitcast=True) - (8388608.0 + SHIFT * UNIT)
    weight = a * (1.0 / UNIT) * code + c
    if RADIX > 0:
        # Adding 1.5 * 2^23 rounds. `SHIFT` and the factor below 1 turn the rounding into a floor.
        weight += b * ((code * (0.984375 / (RADIX * UNIT)) + 12582912.0) - 12582912.0)
    return weight
