r"""Absorption of the column scales of a down projection into the layers that feed it.

An MLP computes  W_down (a(x) * W_up x)  or  W_down r(W_up x)  with a positively homogeneous r such as ReLU. There
column j of W_down, its scale c_j >= 0 included, meets nothing but row j of W_up, so that

    W_down diag(c) (a * W_up x) = W_down (a * diag(c) W_up x)

holds exactly, and c_j times the scales of row j of the quantized W_up (codes and zero points stay), and of its bias,
does what W_down's column scales do. It does not hold for an activation in between that is not homogeneous (GELU), nor
where the product is clamped; and the gate, which goes through a(), is never the partner.

A pair is looked for by the usual names and then tried: the module's own forward pass runs with small random matrices
in the place of its own, once more with scaled rows and columns, on small and large inputs. What changes the output is
no pair.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_rb.quantizers.d2quant.format import is_dual, scale_rows
from hf_rb.quantizers.packed.experts import projections
from hf_rb.quantizers.packed.layer_kinds import LINEAR, features
from hf_rb.quantizers.packed.linear import PackedLinear, PackedModule
from hf_rb.quantizers.packed.weight import SUFFIXES


__all__ = ["Pair", "absorb", "absorbable", "down_projections", "pairs", "refusals"]

logger = logging.get_logger(__name__)

# Names of a down projection, and of those that may be its partner, in this order.
NAMES = {
    "down_proj": ("up_proj", "gate_up_proj", "gate_proj"),
    "w2": ("w3", "w1"),
    "fc2": ("fc1",),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "c_proj": ("c_fc",),
}
ACTIVATIONS = ("activation_fn", "act_fn", "activation", "act")
MAGNITUDES = (1.0, 1e3)  # the second reaches the limits of clamps
HIDDEN, INNER = 8, 6  # of the matrices that a module is tried with


class Pair(NamedTuple):
    """
    A down projection, and whose rows its columns meet.

    Attributes:
        down (`str`): Name of the layer, or of the parameter of fused experts.
        up (`str`): The same of its partner.
        rows (`slice`): Which rows of the partner are those of the columns.
    """

    down: str
    up: str
    rows: slice


def pairs(model: nn.Module) -> list[Pair]:
    """Returns the pairs of a model, before or after quantization; see [`refusals`] for the other down projections."""
    return [found for found in _search(model) if isinstance(found, Pair)]


def refusals(model: nn.Module) -> dict[str, str]:
    """Returns the down projections whose column scales cannot be absorbed, with the reason."""
    return dict(found for found in _search(model) if not isinstance(found, Pair))


def down_projections(model: nn.Module) -> list[str]:
    """Returns the down projections of all MLPs, fused experts among them, whether there is a pair or not."""
    return [found[0] for found in _search(model)]


def absorbable(model: nn.Module) -> list[Pair]:
    """Returns the pairs of which the down projection is packed as sign planes and its partner on grids."""
    found = []
    for pair in pairs(model):
        (down, name), (up, partner) = _owner(model, pair.down), _owner(model, pair.up)
        below, above = getattr(down, "layouts", {}).get(name), getattr(up, "layouts", {}).get(partner)
        if below is not None and above is not None and is_dual(below) and not is_dual(above):
            found.append(pair)
    return found


def absorb(model: nn.Module) -> list[str]:
    """
    Moves the column scales of sign planes into the scales of their partners, wherever that is exact.

    Returns:
        `list[str]`: The down projections that keep theirs, of which a warning gives the reasons.
    """
    kept, reasons = [], refusals(model)
    partners = {pair.down: pair for pair in pairs(model)}
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for parameter in module.layouts:
            if module.packed_weight(parameter).column is None:
                continue
            down = name if isinstance(module, nn.Linear) else f"{name}.{parameter}"
            try:
                if down not in partners:
                    raise ValueError(reasons.get(down, "there is no known partner."))
                _absorb(model, partners[down])
            except ValueError as error:
                kept.append(down)
                reasons[down] = str(error)
    if kept:
        lines = "\n".join(f"{down}: {reasons[down]}" for down in kept[:3]) + ("\n…" if len(kept) > 3 else "")
        logger.warning(
            f"The column scales of {len(kept)} down projections stay beside them and multiply their inputs:\n{lines}"
        )
    return kept


def _absorb(model: nn.Module, pair: Pair) -> None:
    (down, name), (up, partner) = _owner(model, pair.down), _owner(model, pair.up)
    column = down.packed_weight(name).column
    layout = getattr(up, "layouts", {}).get(partner)
    if layout is None or is_dual(layout):
        raise ValueError(f"{pair.up} has no scales to put them into.")
    scale = up.packed_weight(partner).scale
    if scale.is_meta or column.is_meta:
        raise ValueError("it is offloaded.")
    if scale.dtype is not torch.float16:
        raise ValueError(f"the scales of {pair.up} are {scale.dtype}.")
    with torch.no_grad():
        factor = column.to(scale.device)
        scale[..., pair.rows, :, :] = scale_rows(layout, scale[..., pair.rows, :, :], factor)
        bias = getattr(up, "bias" if isinstance(up, nn.Linear) else f"{partner}_bias", None)
        if bias is not None:
            bias[..., pair.rows] = bias[..., pair.rows] * factor
    delattr(down, name + SUFFIXES["column"])


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a parameter of fused experts
        module, _, parameter = name.rpartition(".")
        return model.get_submodule(module), parameter
    return module, "weight"


def _search(model: nn.Module) -> Iterator[Pair | tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and not isinstance(module, nn.Linear) or projections(module):
            yield _experts(name, module)
        elif found := _layers(name, module):
            yield found


def _layers(name: str, module: nn.Module) -> Pair | tuple[str, str] | None:
    linear = {child: layer for child, layer in module.named_children() if isinstance(layer, LINEAR)}
    for down, partners in NAMES.items():
        inner = _sizes(linear[down])[0] if down in linear else 0
        known = [up for up in partners if up in linear and _sizes(linear[up])[1] in (inner, 2 * inner)]
        if not known:
            continue
        prefix = f"{name}." if name else ""
        for up in known:
            fused = _sizes(linear[up])[1] != inner
            for rows in _halves(inner) if fused else [slice(None)]:
                small = [part for part, whole in zip(_halves(INNER), _halves(inner), strict=True) if whole == rows]
                if _is_pair(module, linear, down, up, small[0] if fused else rows):
                    return Pair(prefix + down, prefix + up, rows)
        return prefix + down, _reason(module, known[0])
    return None


def _experts(name: str, experts: Any) -> Pair | tuple[str, str]:
    down, up = f"{name}.down_proj", f"{name}.{'gate_up_proj' if experts.has_gate else 'up_proj'}"

    def between(states: Tensor) -> Tensor:
        apply_gate: Any = getattr(getattr(experts, "experts_class", type(experts)), "_apply_gate", None)
        return apply_gate(experts, states) if experts.has_gate else experts.act_fn(states)

    width = 2 * INNER if experts.has_gate else INNER
    layout = getattr(experts, "layouts", {}).get("down_proj")
    inner = layout.in_features if layout else experts.down_proj.shape[1 if experts.is_transposed else 2]
    tried = zip(_halves(INNER), _halves(inner), strict=True) if experts.has_gate else [(slice(None), slice(None))]
    for small, rows in tried:
        if _scales(between, width, small):
            return Pair(down, up, rows)
    return down, _reason(experts, "gate_up_proj" if experts.has_gate else "up_proj")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Returns the sizes of the input and the output of a linear layer, before or after quantization."""
    return (layer.in_features, layer.out_features) if isinstance(layer, PackedLinear) else features(layer)


def _halves(inner: int) -> list[slice]:
    """Returns the slices in which one half of the rows of a fused projection may be."""
    return [slice(inner, 2 * inner), slice(0, inner), slice(1, 2 * inner, 2), slice(0, 2 * inner, 2)]


def _reason(module: nn.Module, up: str) -> str:
    activation = next((getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)), None)
    between = f" ({type(activation).__name__})" if activation is not None else ""
    return (
        f"what is between {up} and it{between} is not proportional to the output of {up}, as it is after ReLU or in a "
        "gated product without a clamp."
    )


def _is_pair(module: nn.Module, linear: dict[str, nn.Linear | Conv1D], down: str, up: str, rows: slice) -> bool:
    others = [child for name, child in module.named_children() if name not in linear]
    if any(True for child in others for _ in child.parameters()):
        # The layer of a decoder, with attention and norms: nothing but its activation can be tried.
        activations = [getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)]
        return len(activations) == 1 and _scales(activations[0], INNER, slice(None))
    generator = torch.Generator().manual_seed(0)
    trial, inner = copy.copy(module), _sizes(linear[down])[0]
    trial.training, trial._modules = False, {}
    for name, child in module.named_children():
        small = _small(linear[name], name == down, inner, generator) if name in linear else _still(child)
        trial._modules[name] = small
    factor = torch.rand(INNER, generator=generator, dtype=torch.float64) + 0.5
    inputs = torch.randn(4, HIDDEN, generator=generator, dtype=torch.float64)
    outputs = []
    try:
        for scaled in (False, True):
            if scaled:
                trial._modules[up].weight[rows] *= factor[:, None]
                if trial._modules[up].bias is not None:
                    trial._modules[up].bias[rows] *= factor
                trial._modules[down].weight /= factor
            outputs.append([type(module).forward(trial, inputs * size) for size in MAGNITUDES])
        return _same(*outputs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # it takes something else, or more
        return False


def _small(layer: nn.Linear | Conv1D, is_down: bool, inner: int, generator: torch.Generator) -> nn.Linear:
    sizes = {inner: INNER, 2 * inner: 2 * INNER}
    size = (INNER, HIDDEN) if is_down else (HIDDEN, sizes.get(_sizes(layer)[1], HIDDEN))
    small = nn.Linear(*size, layer.bias is not None, dtype=torch.float64).requires_grad_(False)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return small


def _still(child: nn.Module) -> nn.Module:
    """Returns a module without dropout and without hooks."""
    child = copy.copy(child)
    child.training, child._forward_hooks, child._forward_pre_hooks = False, OrderedDict(), OrderedDict()
    return child


def _scales(function: Callable[[Tensor], Tensor], width: int, part: slice) -> bool:
    """Returns whether a part of the input times positive factors is the output times these factors."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(INNER, generator=generator, dtype=torch.float64) + 0.5
    inputs = torch.randn(4, width, generator=generator, dtype=torch.float64)
    scaled = inputs.clone()
    scaled[:, part] *= factor
    try:
        with torch.no_grad():
            expected = [function(inputs * size) * factor for size in MAGNITUDES]
            return _same(expected, [function(scaled * size) for size in MAGNITUDES])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(
        one.shape == other.shape
        and not one.is_meta
        and torch.allclose(one, other, rtol=1e-9, atol=1e-9 * one.abs().max().item())
        for one, other in zip(expected, found, strict=True)
    )
