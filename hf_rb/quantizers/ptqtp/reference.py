"""The two half-steps of PTQTP in torch, for any device and type (`solver.py` has the method).

`solver.c` and `solver_triton.py` take the same steps. Shapes: R rows (groups of equal length), G their length, K
planes, C = 3^K combinations of trits.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hf_rb.quantizers.kernels.layout import sections
from hf_rb.quantizers.ptqtp.options import SolverOptions


__all__ = ["fit_groups", "for_blocks", "nearest_trits"]

# Weights that are worked on at once: few enough to stay in the cache. The solver's own memory is below 100 bytes for
# each.
CHUNK = 1 << 18
MAX_THREADS = 8


def for_blocks(weight: Tensor, group_size: int, work: Callable[[slice, slice, slice, Tensor], None]) -> None:
    """Calls `work(rows, groups, columns, block)` for groups of equal length, about `CHUNK` weights at a time."""

    def run(place: tuple[slice, slice, slice, int]) -> None:
        rows, groups, columns, length = place
        block = weight.detach()[rows, columns].to(torch.promote_types(weight.dtype, torch.float32))
        work(rows, groups, columns, block.reshape(-1, length))

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


def fit_groups(block_RG: Tensor, options: SolverOptions) -> Tensor:
    """Solves groups of equal length and returns their scales `(R, K)`, for each the best of all starts."""
    sorted_RG = _sort_rows(block_RG)
    if not sorted_RG[:, [0, -1]].isfinite().all():  # where sorting puts them
        raise ValueError("The weight has a NaN or an infinite value.")
    prefix_RP = sorted_RG.new_zeros(len(block_RG), block_RG.shape[1] + 1, dtype=torch.float64)
    torch.cumsum(sorted_RG, dim=-1, dtype=torch.float64, out=prefix_RP[:, 1:])
    first, *others = options.starts
    best = _alternate(sorted_RG, prefix_RP, first, options)
    if not others:
        return best
    squares = torch.linalg.vector_norm(block_RG, dim=-1, dtype=torch.float64) ** 2
    lowest = _loss(sorted_RG, prefix_RP, best)
    for start in others:
        scales = _alternate(sorted_RG, prefix_RP, start, options)
        loss = _loss(sorted_RG, prefix_RP, scales)
        better = loss < lowest - 1e-12 * squares  # two starts that end in one place differ by rounding
        best, lowest = torch.where(better[:, None], scales, best), torch.where(better, loss, lowest)
    return best


def _alternate(
    sorted_RG: Tensor, prefix_RP: Tensor, start: tuple[float, ...] | None, options: SolverOptions
) -> Tensor:
    """Alternates the two half-steps from one start and returns the scales `(R, K)`."""
    rows, length = sorted_RG.shape
    if start is None:
        fitted = prefix_RP.new_ones(rows, options.planes)
        # t_1 = ... = t_K = sign(w), where the sign of zero is +1
        gram = prefix_RP.new_full((rows, options.planes, options.planes), length)
        total = torch.linalg.vector_norm(sorted_RG, ord=1, dim=-1, dtype=torch.float64)
        target = total[:, None].expand(-1, options.planes)
    else:
        squares = torch.linalg.vector_norm(sorted_RG, dim=-1, dtype=torch.float64) ** 2
        largest = sorted_RG[:, [0, -1]].abs().amax(-1).double()
        top = torch.minimum(options.reach * (squares / length).sqrt(), largest)
        # In float32, so that sums of scales that should coincide, as 4 - 2 - 1 and 1, do.
        fitted = (top[:, None] * prefix_RP.new_tensor(start)).float().double()
        gram, target = _trit_sums(sorted_RG, prefix_RP, fitted)
    ridge = prefix_RP.new_full((rows,), options.ridge_init)
    where = torch.arange(rows, device=sorted_RG.device)  # the groups that still move

    for _ in range(options.max_iter):
        scales, ridge = _ridge_step(gram, target, ridge, options)
        moved = torch.linalg.vector_norm(scales - fitted[where], dim=-1)
        fitted[where] = scales
        limit = options.tol * (torch.linalg.vector_norm(scales, dim=-1) if options.relative else 1)
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


def _ridge_step(gram: Tensor, target: Tensor, ridge: Tensor, options: SolverOptions) -> tuple[Tensor, Tensor]:
    """Solves `(gram + ridge I) a = target` for every group; an ill-conditioned one again, with the larger ridge it
    gets.
    """
    if options.direction is not None:
        gram = (gram @ options.direction @ options.direction)[:, None, None]
        target = (target @ options.direction)[:, None]
    scales, kappa = _solve_small(gram, target, ridge)
    ill = kappa >= options.kappa_threshold
    if ill.any():
        grown = (ridge * (kappa / options.kappa_threshold).sqrt()).clamp(max=options.ridge_max)
        ridge = torch.where(ill, grown, ridge)
        scales, _ = _solve_small(gram, target, ridge)
    return (scales if options.direction is None else scales * options.direction), ridge


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
