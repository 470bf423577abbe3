"""PTQTP written as the paper states it: nine squared distances for every weight in every iteration.

Slow, and independent of the package: the fast solver is compared with it.
"""

import itertools

import torch


def nearest_trits(w, scales):
    """The lexicographically first pair (or single trit) with the smallest squared distance; `w` (G,), `scales` (K,)."""
    combinations = torch.tensor(list(itertools.product((-1, 0, 1), repeat=len(scales))), dtype=w.dtype)
    distances = (w[:, None] - (combinations * scales).sum(-1)) ** 2
    first = torch.tensor([int((row == row.min()).nonzero()[0]) for row in distances])
    return combinations[first].T


def ridge_scales(w, trits, ridge):
    """Both scales and the Frobenius condition number."""
    (s11, s12), (_, s22) = (trits @ trits.T).tolist()
    b1, b2 = (trits * w).sum(-1).tolist()
    # Exactly (s11 + ridge)(s22 + ridge) - s12^2, without the cancellation.
    determinant = (s11 * s22 - s12 * s12) + ridge * (s11 + s22) + ridge * ridge
    scales = [((s22 * b1 - s12 * b2) + ridge * b1) / determinant, ((s11 * b2 - s12 * b1) + ridge * b2) / determinant]
    kappa = ((s11 + ridge) ** 2 + (s22 + ridge) ** 2 + 2 * s12 * s12) / abs(determinant)
    return torch.tensor(scales, dtype=w.dtype), kappa


def ptqtp(w, max_iter=50, tol=1e-4, ridge=1e-8, ridge_max=1.0, kappa_threshold=1e12):
    """
    Solves one group of float64 weights with two planes.

    Returns the scales, the trits `(2, G)`, and per iteration the scales, the error after the scale step, the error
    after the trit step and the ridge.
    """
    signs = torch.where(w >= 0, 1.0, -1.0).to(w.dtype)
    trits, scales, history = torch.stack([signs, signs]), torch.ones(2, dtype=w.dtype), []
    for _ in range(max_iter):
        previous = scales
        scales, kappa = ridge_scales(w, trits, ridge)
        if kappa >= kappa_threshold:
            ridge = min(ridge * (kappa / kappa_threshold) ** 0.5, ridge_max)
            scales, _ = ridge_scales(w, trits, ridge)
        after_scales = ((w - scales @ trits) ** 2).sum().item()
        trits = nearest_trits(w, scales)
        history.append((scales, after_scales, ((w - scales @ trits) ** 2).sum().item(), ridge))
        if (scales - previous).norm() < tol:
            break
    return scales, trits, history
