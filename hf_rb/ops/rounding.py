"""Rounding of numbers on their way through a model."""

import torch


__all__ = ["coarsest_eps", "smallest_max"]

# Matrix products of float32 that are made with fewer bits: TF32 has 10, bfloat16 7.
_PRODUCTS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def coarsest_eps(device: torch.device, *types: torch.dtype) -> float:
    """Returns the distance of 1 from the next number, in the coarsest of the floating-point types given and of what
    autocast and matrix products use on a device.
    """
    eps = (torch.finfo(kind).eps for kind in _floating(device, types))
    return max(_PRODUCTS[torch.get_float32_matmul_precision()], *eps)


def smallest_max(device: torch.device, *types: torch.dtype) -> float:
    """Returns the largest number that all of the floating-point types given, and the type of autocast on a device, can
    hold.
    """
    return min(torch.finfo(kind).max for kind in _floating(device, types))


def _floating(device: torch.device, types: tuple[torch.dtype, ...]) -> list[torch.dtype]:
    autocast = [torch.get_autocast_dtype(device.type)] if torch.is_autocast_enabled(device.type) else []
    return [kind for kind in (*types, *autocast) if kind.is_floating_point]
