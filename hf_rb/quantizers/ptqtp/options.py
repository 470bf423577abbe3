"""Start and end of the alternation of PTQTP's two half-steps (`solver.py`)."""

from typing import NamedTuple

import torch
from torch import Tensor


__all__ = ["TIED", "SolverOptions", "solver_options"]

# The ridge is a numerical guard. Nothing in the result depends on it, so it is not an option; the third version of the
# paper has 1e6 for the threshold.
LAMBDA_INIT, LAMBDA_MAX, KAPPA_THRESHOLD = 1e-8, 1.0, 1e12

TIED = (3.0, 1.0)

# Starts besides the paper's, as ratios of the scales (ours, not the paper's). Their sum is the largest weight of the
# group, or `REACH` times the root mean square if that is less. Three planes never start from three equal ones: what
# breaks that tie is only the order of the search.
RATIOS = {1: (), 2: ((3.0, 1.0), (1.5, 1.0)), 3: ((4.0, 2.0, 1.0), (9.0, 3.0, 1.0))}
REACH = 2.5


class SolverOptions(NamedTuple):
    """Options of the alternation of the two half-steps."""

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


def solver_options(
    planes: int, max_iter: int, tol: float, tol_mode: str, scale_mode: str, multistart: bool, device: torch.device
) -> SolverOptions:
    """Returns the options that the arguments of [`~hf_rb.quantizers.ptqtp.solve`] ask for."""
    return SolverOptions(
        planes,
        torch.tensor(TIED, dtype=torch.float64, device=device) if scale_mode == "tied" else None,
        starts=starts(planes, multistart),
        max_iter=max_iter,
        tol=tol,
        relative=tol_mode == "relative",
        reach=REACH,
        ridge_init=LAMBDA_INIT,
        ridge_max=LAMBDA_MAX,
        kappa_threshold=KAPPA_THRESHOLD,
    )


def starts(planes: int, multistart: bool) -> tuple[tuple[float, ...] | None, ...]:
    """Returns the starts of so many planes, each as shares of the sum of scales; `None` is the paper's."""
    ratios = [tuple(part / sum(ratio) for part in ratio) for ratio in RATIOS[planes]]
    found = ratios if planes == 3 else [None, *ratios]
    return tuple(found if multistart else found[:1])
