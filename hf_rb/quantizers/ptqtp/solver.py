r"""PTQTP (https://huggingface.co/papers/2509.16989): a matrix as a sum of scaled ternary planes, without calibration
data.

Every group w of G weights of a row is a problem of its own:

    minimise  || w - sum_k a_k t_k ||^2     a_k real,  t_k in {-1, 0, 1}^G

starting from t_k = sign(w) and a_k = 1, two exact half-steps alternate until the scales move less than a tolerance:

1. ridge least squares for the scales,  a = (S'S + l I)^-1 S'w  with S = [t_1 ... t_K] and a tiny l, which grows when
   the Frobenius condition number of the matrix reaches a threshold;
2. for every weight the nearest of the 3^K sums of scales, ties to the lexicographically first combination of trits.

**Why this is fast.** Step 1 needs of the trits only, for every combination c, how many weights take it and their sum.
Given the scales, the combinations are points on a line, so the weights that take c are those between two midpoints. A
group is therefore sorted once, with its prefix sums; an iteration is then one binary search for each midpoint of a
group instead of 3^K distances for each of its weights. The trits are only written out at the end. The result is that
of the literal search, ties included (`tests/quantizers/test_solver.py` compares them).

`reference.py` is the reference, in torch, for any device and type. `solver.c` takes the same steps in the same
precision, several times faster, wherever a weight of at most 32 bits lies in main memory and there is a compiler
(`hf_rb/io/native.py`); on a GPU with Triton the two half-steps are one kernel (`solver_triton.py`). This file chooses
one of them. Every group is solved on its own, so neither threads nor blocks change a result.

**Where this is not Algorithm 1 of the paper:**

- a group stops on its own; the paper stops when the largest change over all groups is below the tolerance;
- after that the scales are brought to the canonical order `a_1 >= a_2 >= 0` and rounded to float16, and the trits are
  searched once more for the rounded scales;
- `tol_mode="absolute"`, the default, solves a matrix of small weights a second time with the relative rule; only
  `"absolute_strict"` is the paper's rule throughout;
- one and three planes, tied scales and multistart are ours, and off by default.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_rb.quantizers.kernels import triton
from hf_rb.quantizers.ptqtp import solver_c
from hf_rb.quantizers.ptqtp.format import TritPlanes, layout_of, row_blocks
from hf_rb.quantizers.ptqtp.options import TIED, SolverOptions, solver_options
from hf_rb.quantizers.ptqtp.reference import fit_groups, for_blocks, nearest_trits


__all__ = ["QuantizedMatrix", "fit_scales", "quantize_matrix", "search_trits", "solve"]

# A layer with a smaller median scale, in units of the tolerance, is solved again with the relative stopping rule.
MIN_SCALE = 30


def _without_autograd(function: Callable) -> Callable:
    # A caller may be in inference mode, which is a property of its thread. A tensor that was made there is an
    # inference tensor, and the worker threads, which are outside, cannot write to it: torch raises "Inplace update to
    # inference tensor outside InferenceMode is not allowed".
    return torch.inference_mode(False)(torch.no_grad()(function))


def solve(
    weight: Tensor,
    group_size: int = 128,
    planes: int = 2,
    *,
    max_iter: int = 50,
    tol: float = 1e-4,
    tol_mode: str = "absolute",
    scale_mode: str = "free",
    multistart: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> TritPlanes:
    """
    Decomposes a matrix into scaled ternary planes (PTQTP, https://huggingface.co/papers/2509.16989, Algorithm 1).

    The scales are brought to the canonical form `a_1 >= a_2 >= 0` (signs and order move into the trits), rounded to
    `scale_dtype`, and the trits are then searched once more for the rounded scales: what is stored is the best choice
    of trits for the stored scales. A plane whose scale is zero has zero trits.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(out_features, in_features)`, any floating type. Solved in float64 sums, on its own
            device.
        group_size, planes, max_iter, tol, tol_mode, scale_mode, multistart:
            As in [`PTQTPConfig`]. What moves of a group's scales is measured by the Euclidean norm; `"relative"`
            compares it with `tol` times that of the scales. Tied scales are so in `scale_dtype` too, which makes the
            result a symmetric integer code from -4 to 4. With `multistart` two planes also start from scales in the
            ratios 3:1 and 1.5:1, three from 4:2:1, their only start otherwise, and 9:3:1.
        scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Type of the returned scales; `torch.float64` leaves them as they are.

    Returns:
        [`TritPlanes`]

    Raises:
        ValueError: The weight is not a floating matrix, has a NaN or an infinite value, or needs scales that
            `scale_dtype` cannot hold; or an option has a value that does not exist.
    """
    scales, resolved = fit_scales(
        weight, group_size, planes, max_iter, tol, tol_mode, scale_mode, scale_dtype, multistart
    )
    return TritPlanes(search_trits(weight, scales, group_size), scales, group_size, resolved)


class QuantizedMatrix(NamedTuple):
    """
    Result of [`quantize_matrix`].

    Attributes:
        packed (`torch.Tensor`): uint8 `(out_features, row_bytes)`, the kernels' layout.
        scales (`torch.Tensor`): float16 `(out_features, groups, planes)`.
        relative_error (`float`): Frobenius norm of what is lost over that of the weight.
        resolved (`bool`): Whether the matrix was solved a second time, with the relative rule.
    """

    packed: Tensor
    scales: Tensor
    relative_error: float
    resolved: bool


@_without_autograd
def quantize_matrix(weight: Tensor, group_size: int = 128, planes: int = 2, **options: Any) -> QuantizedMatrix:
    """
    Solves a matrix as [`solve`] does and packs it, without ever holding all of its trits.

    Takes the arguments of [`solve`], raises what it raises.
    """
    scales, resolved = fit_scales(weight, group_size, planes, **options)
    if solver := _compiled(weight):
        row_bytes = layout_of(weight.shape[1], group_size, planes).row_bytes
        packed, error, norm = solver.encode(weight, scales, group_size, row_bytes)
    else:
        parts, error, norm = [], 0.0, 0.0
        for rows in row_blocks(*weight.shape):
            trits = TritPlanes(search_trits(weight[rows], scales[rows], group_size), scales[rows], group_size)
            parts.append(trits.pack("nibble")["weight"])
            original = weight[rows].float()
            error += (trits.dequantize() - original).square().sum(dtype=torch.float64).item()
            norm += original.square().sum(dtype=torch.float64).item()
        packed = torch.cat(parts)
    return QuantizedMatrix(packed, scales, (error / norm) ** 0.5 if norm else 0.0, resolved)


@_without_autograd
def fit_scales(
    weight: Tensor,
    group_size: int,
    planes: int,
    max_iter: int = 50,
    tol: float = 1e-4,
    tol_mode: str = "absolute",
    scale_mode: str = "free",
    scale_dtype: torch.dtype = torch.float16,
    multistart: bool = False,
) -> tuple[Tensor, bool]:
    """Returns the scales of [`solve`] `(out_features, groups, planes)`, and whether it took a second attempt to find
    them.
    """
    _check(weight, planes, tol_mode, scale_mode)
    options = solver_options(planes, max_iter, tol, tol_mode, scale_mode, multistart, weight.device)
    scales = _fit_matrix(weight, group_size, options)
    resolved = tol_mode == "absolute" and _is_small(scales, MIN_SCALE * tol)
    if resolved:
        scales = _fit_matrix(weight, group_size, options._replace(relative=True))
    return _round(scales, scale_dtype, tied=scale_mode == "tied"), resolved


@_without_autograd
def search_trits(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Returns the best trits `(planes, out_features, in_features)`, int8, for given scales."""
    if solver := solver_c.solver(weight):
        return solver.trits(weight, scales, group_size)
    trits = torch.empty(scales.shape[-1], *weight.shape, dtype=torch.int8, device=weight.device)

    def search(rows: slice, groups: slice, columns: slice, block: Tensor) -> None:
        found = nearest_trits(block, scales[rows, groups].flatten(0, 1).double())
        trits[:, rows, columns] = found.view(len(trits), -1, columns.stop - columns.start)

    for_blocks(weight, group_size, search)
    return trits


def _compiled(weight: Tensor):
    """Returns what has `fit` and `encode` for this weight, or `None`."""
    if weight.device.type == "cpu":
        return solver_c.solver(weight)
    if not triton.available(weight.device):
        return None
    from hf_rb.quantizers.ptqtp import solver_triton  # needs Triton

    return solver_triton


def _check(weight: Tensor, planes: int, tol_mode: str, scale_mode: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"Expected a non-empty floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}.")
    if planes not in (1, 2, 3):
        raise ValueError(f"planes must be 1, 2 or 3, got {planes}.")
    if tol_mode not in ("absolute", "relative", "absolute_strict"):
        raise ValueError(f"tol_mode must be 'absolute', 'relative' or 'absolute_strict', got {tol_mode!r}.")
    if scale_mode not in ("free", "tied") or (scale_mode == "tied" and planes != 2):
        raise ValueError(
            f"scale_mode must be 'free', or 'tied' with planes=2; got {scale_mode!r} with planes={planes}."
        )


def _fit_matrix(weight: Tensor, group_size: int, options: SolverOptions) -> Tensor:
    """Returns canonical float64 scales `(out_features, groups, planes)`."""
    if solver := _compiled(weight):
        return solver.fit(weight, group_size, options)
    groups = -(-weight.shape[1] // group_size)
    scales = weight.new_empty(len(weight), groups, options.planes, dtype=torch.float64)

    def fit(rows: slice, groups: slice, columns: slice, block: Tensor) -> None:
        canonical = fit_groups(block, options).abs().sort(-1, descending=True).values
        scales[rows, groups] = canonical.unflatten(0, (-1, groups.stop - groups.start))

    for_blocks(weight, group_size, fit)
    return scales


def _is_small(scales: Tensor, limit: float) -> bool:
    used = scales[scales != 0]
    return bool(used.numel()) and bool(used.median() < limit)


def _round(scales: Tensor, dtype: torch.dtype, tied: bool) -> Tensor:
    if tied:
        # Nine bits of mantissa, so that three times the scale is exact in float16 as well.
        mantissa, exponent = torch.frexp(scales[..., 1:])
        scales = torch.ldexp((mantissa * 2**9).round() / 2**9, exponent) * scales.new_tensor(TIED)
    rounded = scales.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"A scale of {scales.max():.4g} does not fit {dtype}: rescale the weight.")
    return rounded
