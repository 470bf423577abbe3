"""Biases of layers and norms that have none in their architecture: where corrections are kept."""

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_rb.io.model_class import skeleton


__all__ = ["BIAS_SWITCH", "add_biases", "biases_by_switch", "set_bias"]

BIAS_SWITCH = "mlp_bias"  # in the configurations of Llama and its kind


def set_bias(module: nn.Module, bias: Tensor) -> bool:
    """
    Gives a linear layer or a norm a bias in the type of its weight, or another one.

    Returns:
        `bool`: Whether it had none, so that [`add_biases`] has to make a place for it when the model is loaded.
    """
    new = getattr(module, "bias", None) is None
    if new and not isinstance(module, (nn.Linear, nn.LayerNorm)):  # these add their bias themselves
        module.__class__ = _with_bias(type(module))
    weight: Any = module.weight
    module.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    return new


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the places for biases that a checkpoint has and its architecture has not."""
    for name in names:
        module: Any = model.get_submodule(name)
        size = module.out_features if isinstance(module, nn.Linear) else module.weight.shape
        set_bias(module, torch.zeros(size, device=module.weight.device))


def biases_by_switch(config: PreTrainedConfig, names: Iterable[str]) -> set[str]:
    """Returns the linear layers that have biases if the architecture's switch is on; none if that leaves out one of
    `names`.
    """
    if not hasattr(config, BIAS_SWITCH):
        return set()
    config = copy.deepcopy(config)
    setattr(config, BIAS_SWITCH, True)
    vars(config).pop("quantization_config", None)
    modules = skeleton(config).named_modules()
    found = {name for name, module in modules if isinstance(module, nn.Linear) and module.bias is not None}
    return found if found.issuperset(names) else set()


@cache
def _with_bias(kind: type[nn.Module]) -> type[nn.Module]:
    """A norm that adds its bias to what its kind returns."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return kind.forward(self, *args, **kwargs) + self.bias

    def reduce(self: nn.Module) -> tuple:
        return _new_with_bias, (kind,), vars(self)  # pickle finds no class that was made at run time

    members = {"forward": forward, "__reduce__": reduce, "__module__": kind.__module__}
    return type(f"{kind.__name__}WithBias", (kind,), members)


def _new_with_bias(kind: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_with_bias(kind))
