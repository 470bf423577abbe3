"""The module that turns the learned router of a layer into the one it routes with, for both ways to have it.

The model classes call it in their routers' forward pass; on any other model it is a parametrization of the router's weight.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_rb.models.mpi.functional import (
    GRADIENTS,
    MATRICES,
    effective_router,
    matrix_view,
    row_length,
    weight_name,
    widened,
)


__all__ = ["EffectiveRouter"]

MODES = ("reparam", "inplace")


class EffectiveRouter(nn.Module):
    """
    Computes the effective router of one MoE layer from its learned router and from the experts beside it.

    Without gradients, as in generation, the result is kept until the router, the experts or an adapter on them change. A pass with
    gradients, `train()` and `eval()` drop it. PyTorch does not count changes made through `.data`: call `model.eval()` after one.

    Args:
        block (`nn.Module`):
            The MoE block, which has its experts under the name `experts`. It is looked at in every pass and is not a submodule:
            the experts may get an adapter, or move, at any time.
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
            `"reparam"`: the router is mapped in every pass. `"inplace"`: it is used as it is, and [`~EffectiveRouter.advance`]
            replaces it after an optimizer step.
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
        if ramp_steps:
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
        if torch.is_grad_enabled():
            self._kept = None
            return self._compute(router_ND)
        sources, scalings = self._sources(router_ND)
        if not _changes_are_counted(sources, self.training):
            return self._compute(router_ND)
        if self._kept is None or not self._kept.holds(sources, scalings):
            self._kept = _Kept(self._compute(router_ND), sources, scalings)
        return self._kept.value

    def _sources(self, router_ND: Tensor) -> tuple[list[Tensor], list[float]]:
        experts, adapters = _unwrapped(self._sibling.block.experts, self.matrix)
        sources = [router_ND, getattr(experts, weight_name(experts, self.matrix)), *self.buffers()]
        for wrapper, adapter in adapters:
            sources += [wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight]
        return sources, [wrapper.scaling[adapter] for wrapper, adapter in adapters]

    def _compute(self, router_ND: Tensor) -> Tensor:
        return router_ND if self.mode == "inplace" else self._mapped(router_ND, self.expert_matrix())

    def _mapped(self, router_ND: Tensor, expert_NdD: Tensor) -> Tensor:
        effective_ND = effective_router(
            router_ND, expert_NdD, self.scale, self.iters, norm=self.norm, eps=self.eps, grad=self.grad
        )
        if not self.ramp_steps:
            return effective_ND
        start_ND = widened(self.start)
        share = (self.steps / self.ramp_steps).clamp(max=1).to(start_ND.dtype)
        return torch.lerp(start_ND, widened(effective_ND), share).to(router_ND.dtype)

    def expert_matrix(self) -> Tensor:
        """Returns the matrix of every expert `(N, d, D)` as the experts use it, with the LoRA adapters that are active."""
        experts, adapters = _unwrapped(self._sibling.block.experts, self.matrix)
        weight = getattr(experts, weight_name(experts, self.matrix))
        for wrapper, adapter in adapters:
            left, right, scaling = wrapper.get_delta_factors(adapter)
            weight = torch.baddbmm(weight, left, right, alpha=scaling)
        return matrix_view(experts, self.matrix, weight)

    @torch.no_grad()
    def advance(self, router_ND: Tensor) -> None:
        """Does what follows an optimizer step: iterates the router in place, or goes one step up the ramp."""
        if self.mode == "inplace":
            router_ND.copy_(self._mapped(router_ND, self.expert_matrix()))
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
        return self._mapped(widened(router_ND), widened(self.expert_matrix()))

    def train(self, mode: bool = True) -> "EffectiveRouter":
        self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        length = f"scale={self.scale}" if self.norm is None else f"norm={self.norm}"
        return f"matrix={self.matrix!r}, iters={self.iters}, {length}, mode={self.mode!r}, grad={self.grad!r}"


class _Sibling:
    """
    Refers to the block of a router without making it a submodule. The copy of a model refers to the copied block, the copy of a
    router alone, as PEFT makes one of a module that is trained whole, to the same block.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __deepcopy__(self, memo: dict) -> "_Sibling":
        return _Sibling(memo.get(id(self.block), self.block))


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


def _unwrapped(experts: nn.Module, matrix: str) -> tuple[nn.Module, list[tuple[Any, str]]]:
    """Returns the experts without PEFT's wrappers, and those wrappers, with an adapter's name, that now act on a matrix of them."""
    wrappers = []
    while hasattr(experts, "base_layer"):
        wrappers.append(experts)
        experts = experts.base_layer
    name = weight_name(experts, matrix)
    acting = []
    for wrapper in wrappers:
        if not hasattr(wrapper, "get_delta_factors"):
            raise TypeError(
                f"A router cannot see the adapter {type(wrapper).__name__} on its experts: use LoRA with `target_parameters`, or "
                "fold the routers first (`fold_mpi`)."
            )
        if wrapper.parameter_name == name and not (wrapper.disable_adapters or wrapper.merged):
            acting += [(wrapper, adapter) for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
    return experts, acting


def check_rows(router_ND: Tensor) -> None:
    """
    Raises:
        ValueError: A row is zero: it has no direction to start from, and gets no gradient.
    """
    zero = (router_ND == 0).all(dim=-1).nonzero().flatten().tolist()
    if zero:
        shown = ", ".join(map(str, zero[:8])) + (", …" if len(zero) > 8 else "")
        raise ValueError(
            f"{len(zero)} of {len(router_ND)} rows of a router are zero ({shown}): power iteration needs a direction to start from. "
            "Initialize them, e.g. `torch.nn.init.normal_(router.weight, std=0.02)`."
        )


def check_options(*, matrix, iters, scale, norm, eps, mode, grad, ramp_steps=0) -> None:
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
