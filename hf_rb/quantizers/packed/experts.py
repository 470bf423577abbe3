"""Quantized fused experts: the weights of a mixture's experts, which transformers keep in parameters of three
dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_rb.quantizers import kernels
from hf_rb.quantizers.kernels.layout import Layout
from hf_rb.quantizers.packed.linear import PackedModule, scaled


__all__ = ["PackedExperts", "fused_experts", "input_size", "projections"]

# Facts about the experts of a class, which `use_experts_implementation` sets.
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


def fused_experts(name: str, module: nn.Module) -> list[str]:
    """Returns the names of the parameters in which a module itself keeps the weights of several experts."""
    if isinstance(module, (nn.Linear, nn.Embedding)) or "expert" not in f"{name}.{type(module).__name__}".lower():
        return []
    own = module.named_parameters(recurse=False)
    return [parameter for parameter, value in own if value.ndim > 1 and "bias" not in parameter]


def input_size(experts: nn.Module, name: str) -> int:
    """Returns the columns of a fused weight, as its rows are the outputs."""
    return getattr(experts, name).shape[1 if experts.is_transposed else 2]


def projections(experts: nn.Module) -> tuple[str, str] | None:
    """Returns the names of an experts module's two weights, or `None` if it is built in a way that is not known
    here.
    """
    if not all(isinstance(getattr(experts, flag, None), bool) for flag in FLAGS) or not hasattr(
        experts, "num_experts"
    ):
        return None
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    shapes = {name: (experts.num_experts, None, None) for name in names}
    if experts.has_bias:
        shapes |= {f"{name}_bias": (experts.num_experts, None) for name in names}
    own = dict(experts.named_parameters(recurse=False))
    known = own.keys() == shapes.keys() and all(
        own[name].shape[0] == shape[0] and own[name].ndim == len(shape) for name, shape in shapes.items()
    )
    return names if known else None


class PackedExperts(PackedModule):
    """
    Stands in for a fused experts module of transformers, with one or both of its weights packed.

    A packed projection has the name that it has in the model (`gate_up_proj` or `up_proj`, `down_proj`) and the rows
    `(experts, out)`. Its groups run along the input, and its rows are the outputs, also where the model keeps the
    weight transposed. Biases, activation, gating and whatever else the module has are those of the model.

    Args:
        experts (`nn.Module`):
            The module it stands in for, whose weights may be on the meta device.
        layouts (`dict[str, Layout]`):
            Layouts of the projections that are packed; the others stay as they are.
        activations (`str`, *optional*, defaults to `"exact"`):
            See [`PackedModule`].
        columns (`tuple[str, ...]`, *optional*):
            The packed projections whose inputs have a factor each.
    """

    # Taken over from the model's own module.
    experts_class: Any
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(
        self,
        experts: nn.Module,
        layouts: dict[str, Layout],
        activations: str = "exact",
        columns: tuple[str, ...] = (),
    ):
        super().__init__()
        self.experts_class = type(experts)
        self.activations = activations
        _take_over(self, experts)
        self.layouts = dict(layouts)
        self.adapters: dict[str, list[tuple[Tensor, Tensor, float]]] = {}  # LoRA factors, while a forward pass lasts
        for name, layout in layouts.items():
            weight = getattr(experts, name)
            out_features = weight.shape[2 if self.is_transposed else 1]
            delattr(self, name)
            self.add_packed(name, (len(weight), out_features), layout, weight.device, name in columns)

    @torch.compiler.disable  # how many tokens an expert gets depends on the data
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`):
                `(tokens, hidden)`.
            top_k_index (`torch.Tensor`):
                Experts of every token `(tokens, k)`; the index `num_experts` is none.
            top_k_weights (`torch.Tensor`):
                What their outputs are multiplied with `(tokens, k)`.

        Returns:
            `torch.Tensor`: `(tokens, hidden)`.
        """
        self.restore_scales()
        output = torch.zeros_like(hidden_states)
        chosen, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        for expert, places in enumerate(order[: sum(counts)].split(counts)):
            if not len(places):
                continue
            tokens = places // top_k_index.shape[1]
            states = self._project(hidden_states[tokens], self._first, expert)
            states = self.experts_class._apply_gate(self, states) if self.has_gate else self.act_fn(states)
            states = self._project(states, "down_proj", expert)
            if self.has_post_expert_norm:
                states = self.post_expert_norm(states)
            states = states * top_k_weights.flatten()[places, None]
            output.index_add_(0, tokens, states.to(output.dtype))
        return output

    def extra_repr(self) -> str:
        stored = ", ".join(f"{name}: {self.described(name)}" for name in self.layouts)
        return f"{self.num_experts} of {self.experts_class.__name__}, {stored}"

    @property
    def _first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _project(self, input: Tensor, name: str, expert: int) -> Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        if name not in self.layouts:
            weight = getattr(self, name)[expert]
            return F.linear(input, weight.T if self.is_transposed else weight, bias)
        one = self.packed_weight(name)[expert]
        output = kernels.matmul(
            scaled(input, one.column), one.packed, one.scale, self.layouts[name], bias, self.activations
        )
        for down, up, scaling in self.adapters.get(name, ()):
            added = F.linear(F.linear(input.to(down.dtype), down[expert]), up[expert]) * scaling
            output = output + added.to(output.dtype)
        return output

    def plain(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Returns a module of the model's own class with ordinary weights."""
        experts = self.experts_class.__new__(self.experts_class)
        nn.Module.__init__(experts)
        _take_over(experts, self)
        for name in self.layouts:
            weight = self.unpacked(name, dtype)
            for parameter in self.packed_weight(name).named(name).keys() - {name}:
                delattr(experts, parameter)
            setattr(experts, name, nn.Parameter(weight.mT.contiguous() if self.is_transposed else weight))
        return experts


def _take_over(module: nn.Module, other: nn.Module) -> None:
    """Gives a module the attributes, parameters, buffers and children of another."""
    ours = {"experts_class", "layouts", "adapters"}
    for name, value in vars(other).items():
        if name == "_is_expert_parallel" or not (name.startswith("_") or name in ours):
            setattr(module, name, value)
    for kind in ("_parameters", "_buffers", "_modules"):
        getattr(module, kind).update(getattr(other, kind))
