"""How coarsely numbers are rounded on their way through a model."""

import torch


__all__ = ["coarsest_eps"]

# Matrix products of float32 that are made with fewer bits: TF32 has 10, bfloat16 7.
_PRODUCTS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def coarsest_eps(device: torch.device, *types: torch.dtype) -> float:
    """Returns the distance of 1 from the next number, in the coarsest of the floating-point types given and of what autocast and matrix
    products use on a device."""
    if torch.is_autocast_enabled(device.type):
        types += (torch.get_autocast_dtype(device.type),)
    eps = (torch.finfo(kind).eps for kind in types if kind.is_floating_point)
    return max(_PRODUCTS[torch.get_float32_matmul_precision()], *eps)
