"""The path that needs no kernel: dequantize a layer once, then multiply as usual.

The dequantized weight is kept, because unpacking costs far more than a multiplication. A model that has run therefore
takes the memory of its packed weights **and** of its weights in the type of the activations: here quantization makes the
file smaller and leaves the speed as it was, it does not save memory at run time.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


__all__ = ["forget", "linear"]

# Beside the layers rather than in them: a copy, a pickle or a state dict of a layer does not contain it.
_dequantized: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = WeakKeyDictionary()


def linear(input: Tensor, layer: nn.Module) -> Tensor:
    """See [`hf_rb.quantizers.kernels.linear`]."""
    return F.linear(input, _weight(layer, input.dtype), layer.bias)


def forget(layer: nn.Module) -> None:
    """Frees the dequantized weight of a layer; the next forward pass makes it again."""
    _dequantized.pop(layer, None)


@torch.compiler.disable
def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    # A layer whose parameters come and go with every call has them somewhere else because there is no room here.
    if getattr(getattr(layer, "_hf_hook", None), "offload", False):
        return layer.dequantize(dtype)
    key = (dtype, *(_state(parameter) for parameter in (layer.weight, layer.weight_scale)))
    if layer not in _dequantized or _dequantized[layer][0] != key:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # a tensor born in inference mode could not be trained through
            _dequantized[layer] = key, layer.dequantize(dtype)
    return _dequantized[layer][1]


def _state(parameter: Tensor) -> tuple:
    version = None if parameter.is_inference() else parameter._version
    return parameter.device, parameter.data_ptr(), version
