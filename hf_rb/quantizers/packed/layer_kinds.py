"""Layers that compute a linear map, of any class: which they are, their sizes, and which way round they keep the
weight.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_rb.utils.random_state import random_states_kept


__all__ = ["LINEAR", "features", "is_linear_map", "is_transposed"]

LINEAR = (nn.Linear, Conv1D)
SMALL = (6, 10)  # sizes of the matrix with which a layer is tried
INPUTS = ((4,), (2, 3))  # leading dimensions of what it is tried on
MAGNITUDES = (1.0, 1e3)


def is_transposed(module: nn.Module) -> bool:
    """Returns whether a module keeps its weights with the inputs first, `(in, out)` or `(experts, in, out)`."""
    layer: Any = module
    return getattr(layer, "is_transposed", isinstance(module, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """Returns the sizes of the input and the output of a layer with an ordinary weight."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if is_transposed(module) else (columns, rows)


def is_linear_map(module: nn.Module) -> bool:
    """
    Returns whether a layer is an `nn.Linear` or a `Conv1D`, or of a subclass that computes the same.

    A subclass is tried: its own forward pass runs with a small random matrix in the place of its weight, in training
    and in evaluation mode. The weight itself is not looked at and may be on the meta device.
    """
    if type(module) is nn.Linear:
        return True
    # A subclass in PyTorch itself marks a layer whose weight is handed to a function.
    if not isinstance(module, LINEAR) or type(module).__module__.startswith("torch."):
        return False
    own = {name for name, value in module.named_parameters() if value is not None}
    weight: Any = getattr(module, "weight", None)
    if not {"weight"} <= own <= {"weight", "bias"} or any(True for _ in module.buffers()) or weight.ndim != 2:
        return False
    sizes = dict(zip(weight.shape, SMALL, strict=True))  # a square matrix stays square
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64, device="cpu")

    trial: Any = copy.copy(module)
    trial.__dict__ |= {
        name: sizes[value] for name, value in vars(module).items() if type(value) is int and value in sizes
    }
    matrix = random(*(sizes[size] for size in weight.shape))
    bias = random(sizes[features(module)[1]]) if "bias" in own else None
    trial._parameters = {name: value for name, value in (("weight", matrix), ("bias", bias))}
    matrix = matrix.T if is_transposed(module) else matrix
    try:
        with random_states_kept(), torch.no_grad():
            for trial.training in (True, False):
                for leading in INPUTS:
                    input = random(*leading, matrix.shape[1])
                    for size in MAGNITUDES:
                        found, expected = trial(input * size), F.linear(input * size, matrix, bias)
                        if found.shape != expected.shape or found.dtype != expected.dtype:
                            return False
                        if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item()):
                            return False
    except Exception:  # whatever a forward pass of somebody else's raises, it is no linear map
        return False
    return True
