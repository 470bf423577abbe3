"""Tries an adapter on one packed layer before it is attached to a model.

PEFT has dozens of adapters and gets new ones all the time. Those that work beside a layer do as well on a packed one;
those that read its weight would read bytes. Which is which is seen by trying: the adapter is put on a copy of the
layer and on an ordinary layer with the same weights, both get the same random numbers, and their outputs are compared.
"""

import copy
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_rb.quantizers.loading.adapters import PlainWeightsNeeded
from hf_rb.quantizers.packed.linear import PackedLinear
from hf_rb.utils import compat
from hf_rb.utils.random_state import random_states_kept


__all__ = ["check_adapter", "check_trained_module"]

TOLERANCE = 1e-3  # of float32 sums over some ten thousand inputs, by another order
# Fields of a configuration that are about other modules of a model, with their values for one layer.
ALONE = dict.fromkeys(
    (
        "exclude_modules",
        "layer_replication",
        "layers_to_transform",
        "modules_to_save",
        "target_parameters",
        "trainable_token_indices",
    )
)
ALONE |= {"target_modules": ["layer"]}

_on_trial: weakref.WeakSet = weakref.WeakSet()
_passed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by tuner: configurations, and classes of layers


def check_adapter(tuner: nn.Module, config: Any, model: nn.Module, target: str | None = None) -> None:
    """
    Raises an error for an adapter that does not work on packed layers. Global random states stay as they are.

    Args:
        tuner (`peft.tuners.tuners_utils.BaseTuner`):
            What is about to adapt the model.
        config (`peft.PeftConfig`):
            Describes the adapter.
        model (`nn.Module`):
            The model.
        target (`str`, *optional*):
            Last component of the name of the layer that is next. Without one, any packed layer is tried.

    Raises:
        PlainWeightsNeeded: The layer is packed, and the adapter does other things on it than on an ordinary layer.
    """
    named = (
        (name, base_of(part)) for name, part in model.named_modules() if target in (None, name.rpartition(".")[2])
    )
    name, base = next(((name, base) for name, base in named if isinstance(base, PackedLinear)), (None, None))
    if base is None or tuner in _on_trial:
        return
    passed = _passed.setdefault(tuner, [])
    if any(one() is config and kind is type(base) for one, kind in passed):
        return
    # PEFT may be making a model without memory (`low_cpu_mem_usage`).
    plain, packed = compat.skip_init_on_device(_outcomes)(type(tuner), config, base)
    if isinstance(packed, PlainWeightsNeeded):
        raise packed
    same = (
        _same(plain, packed) if isinstance(plain, Tensor) and isinstance(packed, Tensor) else str(plain) == str(packed)
    )
    if not same:
        raise PlainWeightsNeeded(
            f"{type(config).__name__} as given cannot be attached to {name}, which is packed: it works with the "
            "plain weights. Take an adapter that works beside the layer, such as LoRA, or call `model.dequantize()` "
            "first."
        )
    passed.append((weakref.ref(config), type(base)))  # the error of both is PEFT's to tell


def check_trained_module(module: nn.Module) -> None:
    """Raises a `ValueError` for a module that is to be trained as a whole and holds packed layers."""
    if names := [name for name, part in module.named_modules() if hasattr(part, "layouts")]:
        raise PlainWeightsNeeded(
            f"`modules_to_save` names {f'a module in which {names[0]} is' if names[0] else 'a layer that is'} "
            "packed, and bytes cannot be trained: name it in `target_modules`, or leave it out of the quantization "
            "(`modules_to_not_convert`)."
        )


def base_of(module: nn.Module) -> nn.Module:
    """Returns the layer below all adapters."""
    layer: Any = module
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _copy(base: PackedLinear) -> PackedLinear:
    """Returns a copy on the CPU; of an offloaded layer one with other numbers."""
    columns = base.packed_weight("weight").column is not None
    sizes = base.in_features, base.out_features, base.bias is not None
    twin = PackedLinear(*sizes, base.layout, column=columns, device="cpu", dtype=torch.float32)
    for name, parameter in twin.named_parameters():
        source = getattr(base, name)
        parameter.data.copy_(torch.ones_like(source, device="cpu") if source.is_meta else source.detach())
    return twin


def _outcomes(kind: Any, config: Any, base: PackedLinear) -> list[Tensor | Exception]:
    twin = _copy(base)
    return [_outcome(kind, config, layer) for layer in (twin.plain(), twin)]


def _outcome(kind: Any, config: Any, layer: Any) -> Tensor | Exception:
    """Returns the output of a layer that a new tuner has adapted, or the error that came instead."""
    config, draws = copy.copy(config), torch.Generator().manual_seed(0)
    holder: Any = nn.Module()
    holder.layer = layer
    vars(config).update({name: value for name, value in ALONE.items() if hasattr(config, name)})
    input = torch.randn(2, layer.in_features, generator=draws, dtype=torch.float32)
    tuner = kind.__new__(kind)
    _on_trial.add(tuner)
    with random_states_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            tuner.__init__(holder, {"default": config}, "default")
            adapted = holder.layer.float().eval()
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if parameter.requires_grad and not name.startswith(
                        "base_layer."
                    ):  # most begin where nothing changes
                        parameter += 0.1 * torch.randn(parameter.shape, generator=draws, dtype=torch.float32)
                return adapted(input)
        except Exception as error:
            return error


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=0, atol=TOLERANCE * one.abs().max().item(), equal_nan=True
    )
