"""Where a quantized layer's multiplication is chosen: one function an operation, whatever the device."""

import torch

from hf_rb.quantizers.kernels import reference


__all__ = ["linear"]


def linear(input: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """Returns `input @ weight.T + bias` `(..., out_features)` for a quantized layer that has `dequantize(dtype)`."""
    return reference.linear(input, layer)
