"""Readers of the weight of a linear layer in a forward pass of the model, on the meta device."""

import copy
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rb.quantizers.loading.reads_in_source import is_harmless_at
from hf_rb.utils.random_state import random_states_kept


__all__ = ["record"]

FEW = 4  # modules and parameters of what is no block, a layer among others


class _Watched:
    """Linear layer of a copied model that tells who reads its weight."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            frame = sys._getframe(1)
            if frame.f_locals.get("self") is not self and not is_harmless_at(frame):
                self.__dict__["_readers"].append(frame.f_code.co_qualname)
        return super().__getattr__(name)  # pyrefly: ignore[missing-attribute]  (that of nn.Module)


def record(model: nn.Module, layers: Collection[str]) -> tuple[dict[str, str], str | None]:
    """Returns the readers of layers in a forward pass on the meta device, and why it did not come to its end."""
    readers, problem = _run(model, layers, _alike(model))
    # Code that counts the blocks of a model misses those that were left out. Code that asks for values stops all
    # blocks alike.
    return (readers, problem) if problem is None or "meta tensor" in problem else _run(model, layers, {})


def _run(model: nn.Module, layers: Collection[str], alike: dict[str, str]) -> tuple[dict[str, str], str | None]:
    """Does so without the blocks of which others stand for them, `alike`."""
    copied = _copy(model, alike)
    for module in copied.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True  # as it will be
    readers: dict[str, list[str]] = {}
    modules = dict(copied.named_modules())
    for name in layers:
        if name in modules:
            layer = modules[name]
            layer.__dict__["_readers"] = readers.setdefault(name, [])
            layer.__class__ = type(type(layer).__name__, (_Watched, type(layer)), {})
    problem = None
    with random_states_kept(), torch.no_grad(), torch.device("meta"):  # some set a seed while they run
        for inputs in _inputs(copied):
            try:
                copied(**inputs)
                problem = None
                break
            except Exception as error:  # whatever a model has against this input or this device
                problem = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    found = {}
    for name in layers:
        run = name
        for left, kept in alike.items():  # the outer lists first
            run = kept + run[len(left) :] if run.startswith(f"{left}.") else run
        if readers.get(run):
            found[name] = readers[run][0]
    return found, problem


def _alike(model: nn.Module) -> dict[str, str]:
    """Returns the blocks of a list that are built as an earlier one is, each with that one: it is enough to run one of
    them.
    """
    alike: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(prefix.startswith(f"{left}.") for left in alike):
            kinds: dict[tuple, str] = {}
            for number, block in module.named_children():
                kind = tuple((name, type(part)) for name, part in block.named_modules())
                kind += tuple((name, parameter.shape) for name, parameter in block.named_parameters())
                name = f"{prefix}.{number}"
                if len(kind) > FEW and kind in kinds:
                    alike[name] = kinds[kind]
                else:
                    kinds[kind] = name
    return alike


def _copy(model: nn.Module, alike: dict[str, str]) -> nn.Module:
    """Copies a model without some blocks of its lists."""
    quantizer = getattr(model, "hf_quantizer", None)
    memo: dict[int, object] = {id(quantizer): quantizer}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(left.rpartition(".")[0] == name for left in alike):
            lists[name] = module
    for name, module in reversed(lists.items()):  # the innermost first
        kept = nn.ModuleList()
        memo[id(module)] = kept
        for number, block in module.named_children():
            if f"{name}.{number}" not in alike:
                kept.add_module(number, copy.deepcopy(block, memo))
    return copy.deepcopy(model, memo).eval()


def _inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Returns inputs that a model might take, the likeliest first."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def size(*names: str, default: int) -> int:
        values = (getattr(one, name, None) for one in (config, text) for name in names)
        value = next((value for value in values if value), default)
        return value if isinstance(value, int) else max(value)

    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    pixels = size("image_size", default=224)
    kinds = {
        "input_ids": ids,
        "pixel_values": torch.zeros(1, size("num_channels", default=3), pixels, pixels, device="meta"),
        "input_values": torch.zeros(1, 16000, device="meta"),
        "input_features": torch.zeros(
            1,
            size("num_mel_bins", "input_dim", default=80),
            2 * size("max_source_positions", default=1500),
            device="meta",
        ),
    }
    main: Any = getattr(model, "main_input_name", "input_ids")
    first = {main: kinds.get(main, ids)}
    if getattr(config, "is_encoder_decoder", False):
        first["decoder_input_ids"] = ids
    others = [first | {"use_cache": False}] if hasattr(text, "use_cache") else []
    return [first, *others, *([{"input_ids": ids}] if main != "input_ids" else [])]
