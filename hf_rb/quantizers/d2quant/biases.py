"""Biases of layers and norms that have none in their architecture: where corrections are kept."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn


__all__ = ["add_biases", "set_bias"]


def set_bias(module: nn.Module, bias: Tensor) -> bool:
    """
    Gives a linear layer or a norm a bias in the type of its weight, or another one.

    Returns:
        `bool`: Whether it had none, so that [`add_biases`] has to make a place for it when the model is loaded.
    """
    new = getattr(module, "bias", None) is None
    if new and not isinstance(module, nn.Linear):
        module.__class__ = _with_bias(type(module))
    module.bias = nn.Parameter(bias.to(module.weight), requires_grad=False)
    return new


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the places for biases that a checkpoint has and its architecture has not."""
    for name in names:
        module = model.get_submodule(name)
        size = module.out_features if isinstance(module, nn.Linear) else module.weight.shape
        set_bias(module, torch.zeros(size, device=module.weight.device))


@cache
def _with_bias(kind: type[nn.Module]) -> type[nn.Module]:
    """A norm that adds its bias to what its kind returns."""

    def forward(self: nn.Module, *args, **kwargs) -> Tensor:
        return kind.forward(self, *args, **kwargs) + self.bias

    return type(f"{kind.__name__}WithBias", (kind,), {"forward": forward, "__module__": kind.__module__})
