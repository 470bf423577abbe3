"""Random tensors that a seed decides."""

import torch


__all__ = ["gaussian"]


def gaussian(*shape, seed=0, dtype=torch.float32):
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
