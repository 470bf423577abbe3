"""Readers of the `weight` of a linear layer, besides the layer itself.

A packed `weight` is bytes. Model code that multiplies with it, asks for its type or hands it to a kernel would compute
something else or crash, so a layer with such a reader stays as it is. Readers are found before anything is loaded, by
two means together:

- the source of the model's classes: `self.dt_proj.weight`, the same by another name or through `getattr`, and a layer
  that is handed to a function;
- a forward pass of a copy on the meta device, which sees what is read on the way that a model usually takes, in
  helpers too.

The source also shows what only some devices or settings do. Where it cannot be read, the pass decides, and without
either the model is refused. What is as true of bytes as of numbers counts for nothing: the device, the number of
dimensions, a read that the model's code itself leaves out for quantized models.
"""

import copy
from collections.abc import Callable, Collection, Iterable

from torch import nn
from transformers.utils import logging

from hf_rb.quantizers.config import PackedConfig
from hf_rb.quantizers.loading.reads_in_forward import record
from hf_rb.quantizers.loading.reads_in_source import scan


__all__ = ["find_readers", "note_readers"]

logger = logging.get_logger(__name__)


def note_readers(
    model: nn.Module,
    layers: Collection[str],
    config: PackedConfig,
    pre_quantized: bool,
    means: Callable[[str, str], bool],
) -> tuple[dict[str, str], PackedConfig]:
    """
    Finds the layers that have readers, warns of them, and notes them in the configuration that is stored.

    Args:
        model (`nn.Module`):
            Model on the meta device.
        layers (`Collection[str]`):
            Names of the linear layers that would be packed.
        config ([`PackedConfig`]):
            The configuration as given.
        pre_quantized (`bool`):
            Whether the files of the model are quantized. Then what has readers is packed there, and is unpacked.
        means (`Callable[[str, str], bool]`):
            Whether a pattern of `modules_to_not_convert` means a name.

    Returns:
        `tuple[dict[str, str], PackedConfig]`: For each layer with a reader, which function that is; and the
        configuration, a copy of the given one if there are such layers.
    """
    if config.dequantize or not layers:
        return {}, config
    # The layers of a packed checkpoint ran when it was made. The source tells of other versions of hf_rb and
    # transformers.
    readers = find_readers(model, layers, recorded=not pre_quantized)
    if readers:
        config = copy.copy(config)  # the user's may serve other models
        patterns = _endings(readers, [name for name in layers if name not in readers], means)
        config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *patterns]
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in readers}))
        by = " and ".join(sorted(set(readers.values())))
        what = f"{len(readers)} linear layers of {type(model).__name__} ({kinds})"
        done = f"unpacks {what}" if pre_quantized else f"leaves {what} as they are"
        logger.warning(f"{config.record.name} {done}, because {by} reads their weights.")
    return readers, config


def find_readers(model: nn.Module, layers: Collection[str], recorded: bool = True) -> dict[str, str]:
    """
    Finds the layers that have readers.

    Args:
        model (`nn.Module`):
            Model on the meta device.
        layers (`Collection[str]`):
            Names of the linear layers in question.
        recorded (`bool`, *optional*, defaults to `True`):
            Whether to run a copy of the model too.

    Returns:
        `dict[str, str]`: For each layer with a reader, which function that is.

    Raises:
        ValueError: The source of a class with such layers cannot be read, or reads the weight of something that it
            does not name, and the model does not run on the meta device.
    """
    names = {id(model.get_submodule(name)): name for name in layers}
    found, unknown = scan(model, names)
    if recorded:
        seen, problem = record(model, layers)
        found = seen | found
        if unknown and problem:
            raise ValueError(
                f"{unknown[0]}, and {type(model).__name__} does not run on the meta device ({problem}), so it is not "
                "known which weights have to stay as they are. Define the class in a file, or name its linear layers "
                "in `modules_to_not_convert`."
            )
    return {name: found[name] for name in layers if name in found}


def _endings(names: Iterable[str], others: Collection[str], means: Callable[[str, str], bool]) -> list[str]:
    """Returns patterns that mean all names and none of the others, as short as they can be: a model's part has other
    prefixes.
    """
    patterns: list[str] = []
    for name in names:
        if not any(means(pattern, name) for pattern in patterns):
            parts = name.split(".")
            tails = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
            patterns.append(next((tail for tail in tails if not any(means(tail, other) for other in others)), name))
    return patterns
