r"""PTQTP (https://huggingface.co/papers/2509.16989): a matrix as a sum of scaled ternary planes, without calibration data.

Every group w of G weights of a row is a problem of its own:

    minimise  || w - sum_k a_k t_k ||^2     a_k real,  t_k in {-1, 0, 1}^G

starting from t_k = sign(w) and a_k = 1, two exact half-steps alternate until the scales move less than a tolerance:

1. ridge least squares for the scales,  a = (S'S + l I)^-1 S'w  with S = [t_1 ... t_K] and a tiny l, which grows when the
   Frobenius condition number of the matrix reaches a threshold;
2. for every weight the nearest of the 3^K sums of scales, ties to the lexicographically first combination of trits.

**Why this is fast.** Step 1 needs of the trits only, for every combination c, how many weights take it and their sum. Given
the scales, the combinations are points on a line, so the weights that take c are those between two midpoints. A group is
therefore sorted once, with its prefix sums; an iteration is then one binary search for each midpoint of a group instead of
3^K distances for each of its weights. The trits are only written out at the end. The result is that of the literal search,
ties included (`tests/quantizers/test_solver.py` compares them).

This file is the reference, in torch, for any device and type. `solver.c` takes the same steps in the same precision, several times
faster, wherever a weight of at most 32 bits lies in main memory and there is a compiler (`hf_rb/io/native.py`); on a GPU with Triton
the two half-steps are one kernel (`hf_rb/quantizers/kernels/triton`). Every group is solved on its own, so neither threads nor
blocks change a result.

**Where this is not Algorithm 1 of the paper:**

- a group stops on its own; the paper stops when the largest change over all groups is below the tolerance;
- after that the scales are brought to the canonical order `a_1 >= a_2 >= 0` and rounded to float16, and the trits are searched
  once more for the rounded scales;
- `tol_mode="absolute"`, the default, solves a matrix of small weights a second time with the relative rule; only
  `"absolute_strict"` is the paper's rule throughout;
- one and three planes, tied scales and multistart are ours, and off by default.

Shapes: R rows (groups of equal length), G their length, K planes, C = 3^K combinations.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_rb.quantizers.kernels import triton
from hf_rb.quantizers.kernels.layout import sections
from hf_rb.quantizers.ptqtp import solver_c as native
from hf_rb.quantizers.ptqtp.format import TritPlanes, layout_of, row_blocks


__all__ = ["QuantizedMatrix", "fit_scales", "nearest_trits", "quantize_matrix", "search_trits", "solve"]

# Weights that are worked on at once: few enough to stay in the cache. The solver's own memory is below 100 bytes for each.
CHUNK = 1 << 18
MAX_THREADS = 8

# A layer with a smaller median scale, in units of the tolerance, is solved again with the relative stopping rule.
MIN_SCALE = 30

# The ridge is a numerical guard. Nothing in the result depends on it, so it is not an option; the third version of the paper
# has 1e6 for the threshold.
LAMBDA_INIT, LAMBDA_MAX, KAPPA_THRESHOLD = 1e-8, 1.0, 1e12

TIED = (3.0, 1.0)

# Starts besides the paper's, as ratios of the scales (ours, not the paper's). Their sum is the largest weight of the group, or
# `REACH` times the root mean square if that is less. Three planes never start from three equal ones: what breaks that tie is only
# the order of the search.
RATIOS = {1: (), 2: ((3.0, 1.0), (1.5, 1.0)), 3: ((4.0, 2.0, 1.0), (9.0, 3.0, 1.0))}
REACH = 2.5


def _without_autograd(function: Callable) -> Callable:
    # The threads that fill what the caller's thread has allocated are in no inference mode.
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
    `scale_dtype`, and the trits are then searched once more for the rounded scales: what is stored is the best choice of
    trits for the stored scales. A plane whose scale is zero has zero trits.

    Args:
        weight (`torch.Tensor`):
            Matrix of shape `(out_features, in_features)`, any floating type. Solved in float64 sums, on its own device.
        group_size (`int`, *optional*, defaults to `128`):
            Neighbours in a row that share their scales. A shorter last group is solved on its true length.
        planes (`int`, *optional*, defaults to `2`):
            Ternary planes: 2 is the paper's method with 9 levels, 1 is plain ternary, 3 has 27 levels (not part of the
            paper; starts from scales in the ratio 4:2:1).
        max_iter (`int`, *optional*, defaults to `50`):
            Upper limit of iterations; 14 is typical.
        tol (`float`, *optional*, defaults to `1e-4`):
            A group stops when its scales move less than this (Euclidean norm).
        tol_mode (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"` is the paper's rule. It says little about a matrix of small weights, so one whose median non-zero
            scale is below `30 * tol` is solved again with `"relative"`, which compares with `tol` times the norm of the
            scales. `"absolute_strict"` never does that.
        scale_mode (`str`, *optional*, defaults to `"free"`):
            `"tied"` keeps `a_1 = 3 a_2` exactly, in `scale_dtype` too, which makes the result a symmetric integer code
            from -4 to 4 (not part of the paper).
        multistart (`bool`, *optional*, defaults to `False`):
            Starts from other ratios of the scales as well and keeps the best for each group: 3:1 and 1.5:1 besides the
            paper's start for two planes, 4:2:1 and 9:3:1 for three; one plane has one start. Not part of the paper.
        scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Type of the returned scales; `torch.float64` leaves them as they are.

    Returns:
        [`TritPlanes`]

    Raises:
        ValueError: The weight is not a floating matrix, has a NaN or an infinite value, or needs scales that `scale_dtype`
            cannot hold; or an option has a value that does not exist.
    """
    scales, resolved = fit_scales(
        weight, group_size, planes, max_iter, tol, tol_mode, scale_mode, scale_dtype, multistart
    )
    return TritPlanes(search_trits(weight, scales, group_size), scales, group_size, resolved)


class QuantizedMatrix(NamedTuple):
    """
    What [`quantize_matrix`] returns.

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
def quantize_matrix(
    weight: Tensor,
    *,
    group_size: int = 128,
    planes: int = 2,
    max_iter: int = 50,
    tol: float = 1e-4,
    tol_mode: str = "absolute",
    scale_mode: str = "free",
    multistart: bool = False,
) -> QuantizedMatrix:
    """
    Solves a matrix as [`solve`] does and packs it, without ever holding all of its trits.

    Takes the arguments of [`solve`], raises what it raises.
    """
    scales, resolved = fit_scales(
        weight, group_size, planes, max_iter, tol, tol_mode, scale_mode, multistart=multistart
    )
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
    max_iter: int,
    tol: float,
    tol_mode: str,
    scale_mode: str,
    scale_dtype: torch.dtype = torch.float16,
    multistart: bool = False,
) -> tuple[Tensor, bool]:
    """Returns the scales of [`solve`] `(out_features, groups, planes)`, and whether it took a second attempt to find them."""
    _check(weight, planes, tol_mode, scale_mode)
    direction = torch.tensor(TIED, dtype=torch.float64, device=weight.device) if scale_mode == "tied" else None
    rule = Rule(
        planes,
        direction,
        starts=_starts(planes, multistart),
        max_iter=max_iter,
        tol=tol,
        relative=tol_mode == "relative",
        reach=REACH,
        ridge_init=LAMBDA_INIT,
        ridge_max=LAMBDA_MAX,
        kappa_threshold=KAPPA_THRESHOLD,
    )
    scales = _fit_matrix(weight, group_size, rule)
    resolved = tol_mode == "absolute" and _is_small(scales, MIN_SCALE * tol)
    if resolved:
        scales = _fit_matrix(weight, group_size, rule._replace(relative=True))
    return _round(scales, scale_dtype, tied=scale_mode == "tied"), resolved


@_without_autograd
def search_trits(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Returns the best trits `(planes, out_features, in_features)`, int8, for given scales."""
    if solver := native.solver(weight):
        return solver.trits(weight, scales, group_size)
    trits = torch.empty(scales.shape[-1], *weight.shape, dtype=torch.int8, device=weight.device)

    def search(rows: slice, groups: slice, columns: slice, block: Tensor) -> None:
        found = nearest_trits(block, scales[rows, groups].flatten(0, 1).double())
        trits[:, rows, columns] = found.view(len(trits), -1, columns.stop - columns.start)

    _for_blocks(weight, group_size, search)
    return trits


def _compiled(weight: Tensor):
    """Returns what has `fit` and `encode` for this weight, or `None`."""
    if weight.device.type == "cpu":
        return native.solver(weight)
    if not triton.available(weight.device):
        return None
    from hf_rb.quantizers.ptqtp import solver_triton  # needs Triton

    return solver_triton


class Rule(NamedTuple):
    """How the two half-steps alternate."""

    planes: int
    direction: Tensor | None  # the scales are multiples of it
    # shares of the sum of scales; None is the paper's start
    starts: tuple[tuple[float, ...] | None, ...]
    max_iter: int
    tol: float
    relative: bool
    reach: float
    ridge_init: float
    ridge_max: float
    kappa_threshold: float


def _starts(planes: int, multistart: bool) -> tuple[tuple[float, ...] | None, ...]:
    ratios = [tuple(part / sum(ratio) for part in ratio) for ratio in RATIOS[planes]]
    starts = ratios if planes == 3 else [None, *ratios]
    return tuple(starts if multistart else starts[:1])


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


def _for_blocks(weight: Tensor, group_size: int, work: Callable[[slice, slice, slice, Tensor], None]) -> None:
    """Calls `work(rows, groups, columns, block)` for groups of equal length, about `CHUNK` weights at a time."""

    def run(place: tuple[slice, slice, slice, int]) -> None:
        *slices, length = place
        rows, _, columns = slices
        block = weight.detach()[rows, columns].to(torch.promote_types(weight.dtype, torch.float32))
        work(*slices, block.reshape(-1, length))

    step, places = max(1, CHUNK // weight.shape[1]), []
    for first in range(0, len(weight), step):
        group = 0
        for start, count, length in sections(weight.shape[1], group_size):
            slices = slice(first, first + step), slice(group, group + count), slice(start, start + count * length)
            places.append((*slices, length))
            group += count
    if weight.device.type != "cpu":
        for place in places:
            run(place)
        return
    # A block a thread. Torch's own threads would have to meet after each of many short operations.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, places))
    finally:
        torch.set_num_threads(threads)  # what one thread sets is what later ones start with


def _fit_matrix(weight: Tensor, group_size: int, rule: Rule) -> Tensor:
    """Returns canonical float64 scales `(out_features, groups, planes)`."""
    if solver := _compiled(weight):
        return solver.fit(weight, group_size, rule)
    groups = -(-weight.shape[1] // group_size)
    scales = weight.new_empty(len(weight), groups, rule.planes, dtype=torch.float64)

    def fit(rows: slice, groups: slice, columns: slice, block: Tensor) -> None:
        canonical = _fit(block, rule).abs().sort(-1, descending=True).values
        scales[rows, groups] = canonical.unflatten(0, (-1, groups.stop - groups.start))

    _for_blocks(weight, group_size, fit)
    return scales


def _fit(block_RG: Tensor, rule: Rule) -> Tensor:
    """Solves groups of equal length and returns their scales `(R, K)`, for each the best of all starts."""
    sorted_RG = _sort_rows(block_RG)
    if not sorted_RG[:, [0, -1]].isfinite().all():  # where sorting puts them
        raise ValueError("The weight has a NaN or an infinite value.")
    prefix_RP = sorted_RG.new_zeros(len(block_RG), block_RG.shape[1] + 1, dtype=torch.float64)
    torch.cumsum(sorted_RG, dim=-1, dtype=torch.float64, out=prefix_RP[:, 1:])
    first, *others = rule.starts
    best = _alternate(sorted_RG, prefix_RP, first, rule)
    if not others:
        return best
    squares = torch.linalg.vector_norm(block_RG, dim=-1, dtype=torch.float64) ** 2
    lowest = _loss(sorted_RG, prefix_RP, best)
    for start in others:
        scales = _alternate(sorted_RG, prefix_RP, start, rule)
        loss = _loss(sorted_RG, prefix_RP, scales)
        better = loss < lowest - 1e-12 * squares  # two starts that end in one place differ by rounding
        best, lowest = torch.where(better[:, None], scales, best), torch.where(better, loss, lowest)
    return best


def _alternate(sorted_RG: Tensor, prefix_RP: Tensor, start: tuple[float, ...] | None, rule: Rule) -> Tensor:
    """Alternates the two half-steps from one start and returns the scales `(R, K)`."""
    rows, length = sorted_RG.shape
    if start is None:
        fitted = prefix_RP.new_ones(rows, rule.planes)
        # t_1 = ... = t_K = sign(w), where the sign of zero is +1
        gram = prefix_RP.new_full((rows, rule.planes, rule.planes), length)
        total = torch.linalg.vector_norm(sorted_RG, ord=1, dim=-1, dtype=torch.float64)
        target = total[:, None].expand(-1, rule.planes)
    else:
        squares = torch.linalg.vector_norm(sorted_RG, dim=-1, dtype=torch.float64) ** 2
        largest = sorted_RG[:, [0, -1]].abs().amax(-1).double()
        top = torch.minimum(rule.reach * (squares / length).sqrt(), largest)
        # In float32, so that sums of scales that should coincide, as 4 - 2 - 1 and 1, do.
        fitted = (top[:, None] * prefix_RP.new_tensor(start)).float().double()
        gram, target = _trit_sums(sorted_RG, prefix_RP, fitted)
    ridge = prefix_RP.new_full((rows,), rule.ridge_init)
    where = torch.arange(rows, device=sorted_RG.device)  # the groups that still move

    for _ in range(rule.max_iter):
        scales, ridge = _ridge_step(gram, target, ridge, rule)
        moved = torch.linalg.vector_norm(scales - fitted[where], dim=-1)
        fitted[where] = scales
        limit = rule.tol * (torch.linalg.vector_norm(scales, dim=-1) if rule.relative else 1)
        active = (moved >= limit) & (moved > 0)
        if not active.any():
            break
        # A group that has converged keeps its scales and is worked on no more.
        where, scales, ridge = where[active], scales[active], ridge[active]
        gram, target = _trit_sums(sorted_RG[where], prefix_RP[where], scales)
    return fitted


def _loss(sorted_RG: Tensor, prefix_RP: Tensor, scales: Tensor) -> Tensor:
    """Squared error of the nearest trits, up to the squared norm of the weights."""
    gram, target = _trit_sums(sorted_RG, prefix_RP, scales)
    return ((gram @ scales[:, :, None])[..., 0] - 2 * target).mul(scales).sum(-1)


def _sort_rows(block: Tensor) -> Tensor:
    if block.device.type == "cpu":
        # numpy's vectorised sort takes a thirtieth of the time of torch's on rows of this length.
        return torch.from_numpy(np.sort(block.numpy(), axis=-1))
    return block.sort(-1).values


def _ridge_step(gram: Tensor, target: Tensor, ridge: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Solves `(gram + ridge I) a = target` for every group; an ill-conditioned one again, with the larger ridge it gets."""
    if rule.direction is not None:
        gram = (gram @ rule.direction @ rule.direction)[:, None, None]
        target = (target @ rule.direction)[:, None]
    scales, kappa = _solve_small(gram, target, ridge)
    ill = kappa >= rule.kappa_threshold
    if ill.any():
        grown = (ridge * (kappa / rule.kappa_threshold).sqrt()).clamp(max=rule.ridge_max)
        ridge = torch.where(ill, grown, ridge)
        scales, _ = _solve_small(gram, target, ridge)
    return (scales if rule.direction is None else scales * rule.direction), ridge


def _solve_small(gram: Tensor, target: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns the solutions `(R, K)` and the Frobenius condition numbers `(R,)`, for one to three planes.

    The ridge stays in terms of its own: counts are exact integers, and `128 + 1e-8` would lose most of it.
    """
    if target.shape[1] == 1:
        return target / (gram[:, 0] + ridge[:, None]), torch.ones_like(ridge)
    if target.shape[1] == 3:
        return _solve_three(gram, target, ridge)
    s11, s12, s22 = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    b1, b2 = target.unbind(-1)
    determinant = (s11 * s22 - s12**2) + ridge * (s11 + s22) + ridge**2
    first = (s22 * b1 - s12 * b2) + ridge * b1
    second = (s11 * b2 - s12 * b1) + ridge * b2
    squared_norm = (s11 + ridge) ** 2 + (s22 + ridge) ** 2 + 2 * s12**2
    return torch.stack([first, second], dim=-1) / determinant[:, None], squared_norm / determinant.abs()


def _solve_three(gram: Tensor, target: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    # det(G + lI) and adj(G + lI) as polynomials in l, with the adjugate of the integer matrix G
    row0, row1, row2 = gram.unbind(1)
    cross = torch.linalg.cross
    adjugate = torch.stack([cross(row1, row2), cross(row2, row0), cross(row0, row1)], dim=-1)
    eye = torch.eye(3, dtype=gram.dtype, device=gram.device)
    trace, minors = gram.diagonal(dim1=1, dim2=2).sum(-1), adjugate.diagonal(dim1=1, dim2=2).sum(-1)
    determinant = (row0 * adjugate[..., 0]).sum(-1) + ridge * minors + ridge**2 * trace + ridge**3
    rest = trace[:, None, None] * eye - gram
    l_R11, b = ridge[:, None, None], target[..., None]
    first = (adjugate @ b + l_R11 * (rest @ b) + l_R11**2 * b)[..., 0]
    norm = torch.linalg.matrix_norm(gram + l_R11 * eye)
    inverse_norm = torch.linalg.matrix_norm(adjugate + l_R11 * rest + l_R11**2 * eye)
    return first / determinant[:, None], norm * inverse_norm / determinant.abs()


@cache
def _combinations(planes: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """All `(C, K)` combinations of trits in lexicographic order."""
    trits = torch.arange(-1, 2, dtype=dtype, device=device)
    return torch.cartesian_prod(*[trits] * planes).view(-1, planes)


def _intervals(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """
    Cuts the line between the sums of scales.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `cuts` `(R, C - 1)`, ascending, in the `dtype` of the weights, and `codes`
        `(R, C)`: a weight with exactly n cuts strictly below it takes combination `codes[n]`.
    """
    levels = scales @ _combinations(scales.shape[1], scales.device).T
    levels, codes = levels.sort(dim=-1, stable=True)
    # Combinations that coincide, as (0, 1) and (1, 0) do if a_1 = a_2, are one: the lexicographically first.
    same = levels[:, 1:] == levels[:, :-1]
    if same.any():
        for i in range(1, codes.shape[1]):
            codes[:, i] = torch.where(same[:, i - 1], codes[:, i - 1], codes[:, i])
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    # A weight exactly in the middle goes to the lexicographically first of the two.
    tie_goes_down = codes[:, :-1] < codes[:, 1:]
    cuts = torch.where(tie_goes_down, middle, _next_below(middle))
    # A float32 w is above a cut exactly when it is above the largest float32 that is not above the cut.
    rounded = cuts.to(dtype)
    return torch.where(rounded > cuts, _next_below(rounded), rounded), codes


def _next_below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def _trit_sums(sorted_RG: Tensor, prefix_RP: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Returns S'S `(R, K, K)` and S'w `(R, K)` for the trits that are nearest under `scales`."""
    cuts, codes = _intervals(scales, sorted_RG.dtype)
    # Interval n holds the sorted weights ends[n] to ends[n + 1].
    ends = codes.new_zeros(len(codes), codes.shape[1] + 1)
    ends[:, 1:-1] = torch.searchsorted(sorted_RG, cuts, right=True)
    ends[:, -1] = sorted_RG.shape[1]
    counts = torch.zeros_like(codes, dtype=scales.dtype).scatter_add_(1, codes, ends.diff().to(scales.dtype))
    sums = torch.zeros_like(counts).scatter_add_(1, codes, prefix_RP.gather(1, ends).diff())
    combinations = _combinations(scales.shape[1], scales.device)
    products = (combinations[:, :, None] * combinations[:, None, :]).flatten(1)
    return (counts @ products).unflatten(-1, (scales.shape[1], -1)), sums @ combinations


def nearest_trits(block_RG: Tensor, scales: Tensor) -> Tensor:
    """
    Returns for every weight the trits of the nearest sum of scales, ties to the lexicographically first (step 2).

    Args:
        block_RG (`torch.Tensor`):
            Groups `(R, G)`, float32 or float64.
        scales (`torch.Tensor`):
            float64 `(R, K)`, of any sign and order.

    Returns:
        `torch.Tensor`: int8 `(K, R, G)`.
    """
    cuts, codes = _intervals(scales, block_RG.dtype)
    cuts_below = torch.zeros_like(block_RG, dtype=torch.uint8)
    for i in range(cuts.shape[1]):
        cuts_below += block_RG > cuts[:, i, None]
    codes = codes.gather(1, cuts_below.long())
    trits = _combinations(scales.shape[1], scales.device, torch.int8)
    return torch.stack([plane[codes] for plane in trits.T.contiguous()]) * (scales != 0).T[:, :, None]


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
