"""The module that turns the learned router of a layer into the one it routes with, for both ways to have it.

The model classes call it in their routers' forward pass; on any other model it is a parametrization of the router's
weight.
"""

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_rb.models.mpi.functional import (
    GRADIENTS,
    MATRICES,
    effective_router_and_weight,
    matrix_view,
    row_length,
    weight_name,
    widened,
)


__all__ = ["EffectiveRouter", "check_options", "check_rows"]

MODES = ("reparam", "inplace")


class EffectiveRouter(nn.Module):
    """
    Computes the effective router of one MoE layer from its learned router and from the experts beside it.

    Without gradients, as in generation, the result is kept until the router, the experts or an adapter on them change.
    A pass with gradients, `train()` and `eval()` drop it. PyTorch does not count changes made through `.data`: call
    `model.eval()` after one.

    Args:
        block (`nn.Module`):
            The MoE block, which has its experts under the name `experts`. It is looked at in every pass and is not a
            submodule: the experts may get an adapter, or move, at any time.
        matrix (`str`, *optional*, defaults to `"gate"`):
            Matrix of the experts: `"gate"`, `"up"` or `"down"`.
        iters (`int`, *optional*, defaults to `1`):
            Power steps.
        scale (`float`, *optional*, defaults to `2.0`):
            C': rows have length C' / √N.
        norm (`float`, *optional*):
            C, the length of the rows, instead of `scale`.
        eps (`float`, *optional*, defaults to `1e-12`):
            Smallest length that is divided by.
        mode (`str`, *optional*, defaults to `"reparam"`):
            `"reparam"`: the router is mapped in every pass. `"inplace"`: it is used as it is, and
            [`~EffectiveRouter.advance`] replaces it after an optimizer step.
        grad (`str`, *optional*, defaults to `"full"`):
            Where gradients go; see [`effective_router`].
        ramp_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps over which the router goes linearly from `start` to the effective one.
        start (`torch.Tensor` of shape `(N, D)`, *optional*):
            Router at the beginning of the ramp.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        matrix: str = "gate",
        iters: int = 1,
        scale: float = 2.0,
        norm: float | None = None,
        eps: float = 1e-12,
        mode: str = "reparam",
        grad: str = "full",
        ramp_steps: int = 0,
        start: Tensor | None = None,
    ):
        super().__init__()
        check_options(
            matrix=matrix, iters=iters, scale=scale, norm=norm, eps=eps, mode=mode, grad=grad, ramp_steps=ramp_steps
        )
        self.matrix, self.iters, self.scale, self.norm, self.eps = matrix, iters, scale, norm, eps
        self.mode, self.grad, self.ramp_steps = mode, grad, ramp_steps
        self._sibling = _Sibling(block)
        self._kept: _Kept | None = None
        self._looked_at = False
        self._loan: _Loan | None = None
        self._hooks: list[RemovableHandle] = []
        if ramp_steps and start is not None:
            self.register_buffer("start", start.detach().clone())
            # An integer, which a change of the model's dtype leaves as it is.
            self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=start.device))

    def forward(self, router_ND: Tensor) -> Tensor:
        """Returns the router `(N, D)` that the layer routes with, in the dtype of the learned one."""
        if torch.compiler.is_compiling():
            return self._compute(router_ND)
        if not self._looked_at and not router_ND.is_meta:
            check_rows(router_ND)
            self._looked_at = True
        self._loan = None
        if torch.is_grad_enabled():
            self._kept = None
            return self._compute(router_ND, lend=True)
        sources, scalings = self._sources(router_ND)
        if not _changes_are_counted(sources, self.training):
            return self._compute(router_ND)
        if self._kept is None or not self._kept.holds(sources, scalings):
            self._kept = _Kept(self._compute(router_ND), sources, scalings)
        return self._kept.value

    def _sources(self, router_ND: Tensor) -> tuple[list[Tensor], list[float]]:
        experts, wrappers = _unwrapped(self._sibling.block.experts)
        name = weight_name(experts, self.matrix)
        sources, scalings = [router_ND, getattr(experts, name), *self.buffers()], []
        for wrapper, adapter in _acting(wrappers, name):
            sources += [wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight]
            scalings.append(wrapper.scaling[adapter])
        return sources, scalings

    def _compute(self, router_ND: Tensor, lend: bool = False) -> Tensor:
        if self.mode == "inplace":
            return router_ND
        experts, name, weight = self._weight()
        effective_ND, used = self._mapped(router_ND, weight, experts)
        if lend and used is not weight and weight is experts._parameters.get(name):
            self._loan = _Loan(name, weight, used)
        return effective_ND

    def _mapped(self, router_ND: Tensor, weight: Tensor, experts: nn.Module) -> tuple[Tensor, Tensor]:
        effective_ND, used = effective_router_and_weight(
            router_ND, weight, partial(matrix_view, experts, self.matrix), self.scale, self.iters,
            norm=self.norm, eps=self.eps, grad=self.grad,
        )  # fmt: skip
        if self.ramp_steps:
            start_ND = widened(self.start)
            share = (self.steps / self.ramp_steps).clamp(max=1).to(start_ND.dtype)
            effective_ND = torch.lerp(start_ND, widened(effective_ND), share).to(router_ND.dtype)
        return effective_ND, used

    def _weight(self) -> tuple[nn.Module, str, Tensor]:
        """Returns the experts without wrappers, the name of the weight that has the matrix, and the weight with its
        adapters.
        """
        experts, wrappers = _unwrapped(self._sibling.block.experts)
        name = weight_name(experts, self.matrix)
        weight = getattr(experts, name)
        for wrapper, adapter in _acting(wrappers, name):
            left, right, scaling = wrapper.get_delta_factors(adapter)
            weight = torch.baddbmm(weight, left, right, alpha=scaling)
        return experts, name, weight

    def expert_matrix(self) -> Tensor:
        """Returns the matrix of every expert `(N, d, D)` as the experts use it, with the LoRA adapters that are
        active.
        """
        experts, _, weight = self._weight()
        return matrix_view(experts, self.matrix, weight)

    def add_hooks(self) -> None:
        """Lets the experts take the router's gradient along with theirs. Without it everything is the same, and
        slower.
        """
        experts = _unwrapped(self._sibling.block.experts)[0]
        self._hooks = [
            experts.register_forward_pre_hook(self._lend),
            experts.register_forward_hook(self._take_back, always_call=True),
        ]

    def remove_hooks(self) -> None:
        """Leaves the experts as they were."""
        for hook in self._hooks:
            hook.remove()

    def _lend(self, experts: nn.Module, args: Any) -> None:
        if self._loan is not None:
            self._loan.lend(experts)

    def _take_back(self, experts: nn.Module, args: Any, output: Any) -> None:
        if self._loan is not None:
            self._loan.take_back(experts)
            self._loan = None

    @torch.no_grad()
    def advance(self, router_ND: Tensor) -> None:
        """Does what follows an optimizer step: iterates the router in place, or goes one step up the ramp."""
        if self.mode == "inplace":
            experts, _, weight = self._weight()
            router_ND.copy_(self._mapped(router_ND, weight, experts)[0])
        elif self.ramp_steps:
            self.steps += 1

    @torch.no_grad()
    def folded(self, router_ND: Tensor) -> Tensor:
        """
        Computes in float32 what takes the place of the learned router where the layer is to be an ordinary one.

        Returns:
            `torch.Tensor` of shape `(N, D)`: float32; the learned router itself in `"inplace"` mode.

        Raises:
            ValueError: A row of the router is zero, or the experts have an adapter.
        """
        check_rows(router_ND)
        if hasattr(self._sibling.block.experts, "base_layer"):
            raise ValueError(
                "The experts have an adapter, which a folded router would not follow any more: merge it first "
                "(`model = model.merge_and_unload()`), then fold."
            )
        if self.mode == "inplace":
            return widened(router_ND)
        experts, _, weight = self._weight()
        return self._mapped(widened(router_ND), widened(weight), experts)[0]

    def train(self, mode: bool = True) -> "EffectiveRouter":
        self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        length = f"scale={self.scale}" if self.norm is None else f"norm={self.norm}"
        return f"matrix={self.matrix!r}, iters={self.iters}, {length}, mode={self.mode!r}, grad={self.grad!r}"


class _Sibling:
    """
    Refers to the block of a router without making it a submodule. The copy of a model refers to the copied block, the
    copy of a router alone, as PEFT makes one of a module that is trained whole, to the same block.
    """

    def __init__(self, block: nn.Module):
        self.block: Any = block

    def __deepcopy__(self, memo: dict) -> "_Sibling":
        return _Sibling(memo.get(id(self.block), self.block))


class _Loan:
    """
    A weight that the experts use, for one pass, instead of the equal one that is theirs, so that its gradient comes
    through the router's backward pass. See [`~hf_rb.models.mpi.functional.effective_router_and_weight`].
    """

    def __init__(self, name: str, own: nn.Parameter, used: Tensor):
        self.name, self.own, self.used, self.lent = name, own, used, False

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copy of the router has lent nothing

    def lend(self, experts: nn.Module) -> None:
        self.lent = experts._parameters.get(self.name) is self.own
        if self.lent:
            experts._parameters[self.name] = cast(nn.Parameter, self.used)  # a tensor of the graph, for one pass

    def take_back(self, experts: nn.Module) -> None:
        if self.lent:
            experts._parameters[self.name] = self.own


class _Kept:
    """An effective router and the state of what it was computed from."""

    def __init__(self, value: Tensor, sources: list[Tensor], scalings: list[float]):
        self.value, self.scalings = value, scalings
        self.sources = [(weakref.ref(source), source._version, source.data_ptr()) for source in sources]

    def holds(self, sources: list[Tensor], scalings: list[float]) -> bool:
        return (
            len(sources) == len(self.sources)
            and scalings == self.scalings
            and all(
                reference() is source and version == source._version and address == source.data_ptr()
                for source, (reference, version, address) in zip(sources, self.sources, strict=True)
            )
        )


def _changes_are_counted(sources: list[Tensor], training: bool) -> bool:
    # FSDP gathers what an optimizer has changed into the same memory, and hides that from the counter.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (training and distributed) and not any(source.is_inference() for source in sources)


def _unwrapped(experts: Any) -> tuple[nn.Module, list[Any]]:
    """Returns the experts without PEFT's wrappers, and those."""
    wrappers = []
    while hasattr(experts, "base_layer"):
        wrappers.append(experts)
        experts = experts.base_layer
    return experts, wrappers


def _acting(wrappers: list[Any], name: str) -> Iterator[tuple[Any, str]]:
    """Yields the wrappers, with an adapter's name, that now act on a weight of the experts."""
    for wrapper in wrappers:
        if not hasattr(wrapper, "get_delta_factors"):
            raise TypeError(
                f"A router cannot see the adapter {type(wrapper).__name__} on its experts: use LoRA with "
                "`target_parameters`, or fold the routers first (`fold_mpi`)."
            )
        if wrapper.parameter_name == name and not (wrapper.disable_adapters or wrapper.merged):
            for adapter in wrapper.active_adapters:
                if adapter in wrapper.lora_A:
                    yield wrapper, adapter


def check_rows(router_ND: Tensor) -> None:
    """
    Raises:
        ValueError: A row is zero: it has no direction to start from, and gets no gradient.
    """
    zero = (router_ND == 0).all(dim=-1).nonzero().flatten().tolist()
    if zero:
        shown = ", ".join(map(str, zero[:8])) + (", …" if len(zero) > 8 else "")
        raise ValueError(
            f"{len(zero)} of {len(router_ND)} rows of a router are zero ({shown}): power iteration needs a direction "
            "to start from. Initialize them, e.g. `torch.nn.init.normal_(router.weight, std=0.02)`."
        )


def check_options(
    *,
    matrix: str,
    iters: int,
    scale: float,
    norm: float | None,
    eps: float,
    mode: str,
    grad: str,
    ramp_steps: int = 0,
) -> None:
    """Raises `ValueError` for the first option of [`EffectiveRouter`] that is out of range."""
    for name, value, choices in (("matrix", matrix, MATRICES), ("mode", mode, MODES), ("grad", grad, GRADIENTS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
    for name, value in (("iters", iters), ("ramp_steps", ramp_steps)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}={value!r} must be an integer of 0 or more.")
    if ramp_steps and mode == "inplace":
        raise ValueError("ramp_steps has no meaning with mode='inplace': write mode='reparam'.")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive; the paper has 1e-12.")
    row_length(1, scale, norm)
