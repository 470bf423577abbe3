"""Heads of a model, which stay in floating point, and what a file says about them.

A head is small, new whenever a model is trained for another task, and its errors go straight into the answer. Which
module is one is seen from where it stands: outside the base model, or behind the last stack of layers of a model (a
pooler).
"""

from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from hf_rb.quantizers.packed.layer_kinds import LINEAR
from hf_rb.quantizers.packed.weight import SUFFIXES
from hf_rb.utils import compat


__all__ = ["heads", "packed_parameters"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def heads(model: PreTrainedModel) -> tuple[str, ...]:
    """
    Returns the full names of the modules that make up the heads of a model.

    These are the children of the model beside its base model, and the children behind the last stack of layers in the
    base model (or in the model, where it is its own base). A child that holds a stack of layers or another model is no
    head.
    """
    base = model.base_model
    found = []
    if base is not model:
        for name, child in model.named_children():
            if not any(part is base for part in child.modules()) and not _has_layers(child):
                found.append(name)
    prefix = next((f"{name}." for name, part in model.named_modules() if part is base and name), "")
    children = list(base.named_children())
    stacks = [place for place, (_, child) in enumerate(children) if _has_layers(child)]
    if stacks:
        found += [prefix + name for name, _ in children[stacks[-1] + 1 :]]
    return tuple(found)


def _has_layers(module: nn.Module) -> bool:
    """Returns whether a module holds a stack of layers: a list of modules that have linear layers inside."""
    parts = list(module.modules())
    if any(isinstance(part, PreTrainedModel) for part in parts):
        return True
    lists = (part for part in parts if isinstance(part, CONTAINERS))
    return any(
        not isinstance(layer, LINEAR) and any(isinstance(part, LINEAR) for part in layer.modules())
        for one in lists
        for layer in one.children()
    )


def packed_parameters(model: PreTrainedModel, files: Iterable[str | Path]) -> set[str]:
    """Returns the parameters of a model that the files of a quantized checkpoint hold in packed form."""
    from hf_rb.io.parameter_names import ParameterNames  # most checkpoints have no layers in doubt

    find, found = ParameterNames(model), set()
    for file in files:
        for name in compat.load_state_dict(file, map_location="meta"):
            if name.endswith(SUFFIXES["scale"]):
                found.update(find(name.removesuffix(SUFFIXES["scale"]))[0])
    return found
