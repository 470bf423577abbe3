"""Runs the decoder layers of a model one at a time, and watches what reads what."""

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


__all__ = ["Block", "Decoder"]

Calls = list[tuple[tuple, dict[str, Any]]]  # for each layer, what it is called with besides the hidden state


class Decoder:
    """
    The decoder of a model, taken apart.

    Args:
        model (`transformers.PreTrainedModel`):
            Causal language model in memory.

    Attributes:
        name (`str`): Full name of the list of layers.
        layers (`nn.ModuleList`): The layers.
        final_norm (`nn.Module`, *optional*): What makes of the last layer's output what the head reads, if there is a
            head and once [`~Decoder.enter`] has run.

    Raises:
        ValueError: There is no such list.
    """

    def __init__(self, model: PreTrainedModel):
        self.module, self.model = model.get_decoder(), model
        count = model.config.get_text_config().num_hidden_layers
        lists = (part for part in self.module.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
        layers = next(lists, None)
        if layers is None:
            raise ValueError(
                f"{type(model).__name__} has no list of {count} decoder layers: calibration runs them one by one. Use "
                "`backend='rtn'` (`--backend rtn`), which needs no calibration."
            )
        self.layers = layers
        self.name = next(name for name, module in model.named_modules() if module is layers)
        self.final_norm: nn.Module | None = None
        self._calls: dict[int, Calls] = {}

    def enter(self, ids: Tensor) -> Tensor:
        """Returns the hidden state with which a batch of token ids enters the first layer; no layer computes."""
        calls, in_tuple, made = [], [], []
        with ExitStack() as patches:
            for layer in self.layers:
                patches.enter_context(_recorded(layer, calls, in_tuple))
            for part in self.module.children():
                hook = part.register_forward_hook(lambda *call: made.append(call))
                patches.callback(hook.remove)
            result = self.module(input_ids=ids.to(self.module.device), use_cache=False)
        hidden, last = calls[0][0][0], calls[-1][0][0]
        calls = [(args[1:], kwargs) for args, kwargs in calls]
        known = self._calls.setdefault(len(ids), calls)
        if len(calls) != len(self.layers) or not _same(known, calls):
            raise ValueError(
                f"The layers of {type(self.model).__name__} get more than a hidden state and positions, so that they "
                "cannot be calibrated one by one. Use `backend='rtn'` (`--backend rtn`), which needs no calibration."
            )
        makes_output = (
            part for part, args, output in made if output is result.last_hidden_state and args and args[0] is last
        )
        self.final_norm = next(makes_output, None) if self.model.get_output_embeddings() is not None else None
        return hidden

    def block(self, index: int) -> "Block":
        calls = {size: calls[index] for size, calls in self._calls.items()}
        return Block(f"{self.name}.{index}", self.layers[index], calls)


class Block:
    """
    A decoder layer on its own, in float32 until it is closed.

    Args:
        name (`str`):
            Its full name.
        layer (`nn.Module`):
            The layer.
        calls (`dict`):
            By the size of a batch, what the layer is called with besides the hidden state.
    """

    def __init__(self, name: str, layer: nn.Module, calls: dict[int, tuple[tuple, dict[str, Any]]]):
        self.name, self.layer = name, layer
        self.linear = {
            f"{name}.{path}": module for path, module in layer.named_modules() if isinstance(module, nn.Linear)
        }
        self._calls = {size: _wide(call) for size, call in calls.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in _tensors(layer)}
        self._handles: list[RemovableHandle] = []
        layer.float()

    def close(self) -> None:
        """Gives parameters and buffers their types back, and removes the hooks."""
        for handle in self._handles:
            handle.remove()
        for name, tensor in _tensors(self.layer):
            tensor.data = tensor.data.to(self._dtypes[name])

    @property
    def device(self) -> torch.device:
        return next(self.layer.parameters()).device

    def run(self, hidden: Tensor) -> Tensor:
        """Returns the layer's output for a batch of hidden states, float32."""
        args, kwargs = self._calls[len(hidden)]
        output = self.layer(hidden.to(self.device, torch.float32), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def watch(self, hidden: Tensor) -> tuple[Tensor, dict[tuple[str, ...], Tensor]]:
        """Returns the output, and by the names of those that read the same tensor, in the order of running, that
        tensor.
        """
        seen: dict[int, tuple[list[str], Tensor]] = {}
        with ExitStack() as hooks:
            for name, module in self.linear.items():
                hook = module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(id(args[0]), ([], args[0]))[0].append(name)
                )
                hooks.callback(hook.remove)
            output = self.run(hidden)
        return output, {tuple(names): read for names, read in seen.values()}

    def input_of(self, name: str, hidden: Tensor) -> Tensor:
        """Returns what a linear layer reads, float32; the layer runs no further than that."""
        handle = self.linear[name].register_forward_pre_hook(_stop)
        try:
            self.run(hidden)
        except _Stop as stop:
            return stop.value
        finally:
            handle.remove()
        raise ValueError(f"{name} did not run.")

    def norm_of(self, name: str, hidden: Tensor) -> str | None:
        """Returns the full name of the norm whose output a linear layer reads: of a module with a weight that is no
        linear layer.
        """
        made: dict[int, tuple[str, Tensor]] = {}
        with ExitStack() as hooks:
            for path, module in self.layer.named_modules():
                if getattr(module, "weight", None) is not None and not isinstance(module, nn.Linear):
                    hook = module.register_forward_hook(
                        lambda _, __, output, path=path: made.update({id(output): (path, output)})
                    )
                    hooks.callback(hook.remove)
            path, _ = made.get(id(self.input_of(name, hidden)), (None, None))
        return path and f"{self.name}.{path}"

    def shift(self, names: tuple[str, ...], bias: Tensor, norm: str | None = None) -> None:
        """Adds a bias to what the named layers read, or to what a norm returns to all that read it, until this is
        closed.
        """
        bias = bias.to(self.device)
        if norm is not None:
            module = self.layer.get_submodule(norm.removeprefix(f"{self.name}."))
            self._handles.append(module.register_forward_hook(lambda _, __, output: output + bias))
            return
        for name in names:
            hook = self.linear[name].register_forward_pre_hook(lambda _, args: (args[0] + bias, *args[1:]))
            self._handles.append(hook)


class _Stop(Exception):
    def __init__(self, value: Tensor):
        self.value = value


def _stop(module: nn.Module, args: tuple) -> None:
    raise _Stop(args[0])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


@contextmanager
def _recorded(layer: nn.Module, calls: list, in_tuple: list) -> Generator[None]:
    """While open, the layer returns the hidden state that it gets, and writes down what else it gets."""
    before = vars(layer).get("forward")  # accelerate puts its own there
    forward = layer.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        calls.append((args, kwargs))
        if len(calls) == 1:  # to see what layers return
            in_tuple.append(isinstance(forward(*args, **kwargs), tuple))
        return (args[0],) if in_tuple[0] else args[0]

    layer.forward = record
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _wide(value: Any) -> Any:
    """Floating tensors in float32, at any depth."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_wide, value))
    return {key: _wide(item) for key, item in value.items()} if isinstance(value, dict) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)
