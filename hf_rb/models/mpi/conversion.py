"""Puts MPI on any mixture of experts of transformers, and makes ordinary models of those that have it.

A layer is a module with fused experts under the name `experts` and a router under the name `gate` or `router`, whose
`weight` has a row an expert. Nothing else is asked of its code: on any model the effective router is a parametrization
of that weight.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_rb.models.mpi.functional import expert_matrix
from hf_rb.models.mpi.router import EffectiveRouter, check_rows
from hf_rb.utils import compat


__all__ = ["RoutedLayer", "advance", "apply_mpi", "fold_mpi", "routers"]


class RoutedLayer(NamedTuple):
    """
    A layer of a mixture of experts.

    Attributes:
        name (`str`): Name of its block in the model.
        router (`torch.nn.Module`): Router module, which returns logits, weights and indices.
        experts (`torch.nn.Module`): Experts module, or the adapter around it.
        weight (`Callable[[], torch.Tensor]`): Returns the matrix `(N, D)` that the layer routes with now, with its
            gradient.
    """

    name: str
    router: nn.Module
    experts: nn.Module
    weight: Callable[[], Tensor]

    @property
    def mpi(self) -> EffectiveRouter | None:
        """The module that computes the effective router; `None` for an ordinary router."""
        return _mpi_of(self.router)

    @property
    def learned(self) -> nn.Parameter:
        """The matrix `(N, D)` that is learned; an ordinary router routes with it."""
        return cast(nn.Parameter, _learned(self.router))

    def expert_matrix(self) -> Tensor:
        """Returns the experts' matrix `(N, d, D)` that the router is iterated with; of an ordinary layer, the
        gate's.
        """
        return expert_matrix(self.experts) if self.mpi is None else self.mpi.expert_matrix()


def routers(model: nn.Module) -> Iterator[RoutedLayer]:
    """Yields the layers of a mixture of experts, with MPI or without, in the order of the model."""
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        for child in ("gate", "router"):
            router = getattr(block, child, None)
            if isinstance(experts, nn.Module) and isinstance(router, nn.Module) and _fits(_learned(router), experts):
                yield RoutedLayer(name, router, experts, _weight(router))


def _fits(weight: Tensor | None, experts: nn.Module) -> bool:
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    # Under expert parallelism a process counts its own experts alone.
    return len(weight) == getattr(experts, "num_experts", None) or bool(getattr(experts, "_is_expert_parallel", False))


def _parametrization(router: Any) -> Any:
    """Returns what computes the weight of a router with a parametrization of ours: `[0]` is our module."""
    if not parametrize.is_parametrized(router, "weight"):
        return None
    found = router.parametrizations.weight
    return found if isinstance(found[0], EffectiveRouter) else None


def _mpi_of(router: Any) -> EffectiveRouter | None:
    found = _parametrization(router)
    return getattr(router, "mpi", None) if found is None else found[0]


def _learned(router: Any) -> nn.Parameter | None:
    found = _parametrization(router)
    return getattr(router, "weight", None) if found is None else found.original


def _weight(router: Any) -> Callable[[], Tensor]:
    mpi = _mpi_of(router)
    return (lambda: router.weight) if mpi is None else (lambda: mpi(_learned(router)))


def apply_mpi(
    model: nn.Module,
    *,
    matrix: str = "gate",
    iters: int = 1,
    scale: float = 2.0,
    norm: float | None = None,
    mode: str = "reparam",
    grad: str = "full",
    ramp_steps: int = 0,
) -> nn.Module:
    """
    Gives every router of a mixture of experts a manifold power iteration (https://huggingface.co/papers/2606.12397),
    in place.

    Made for a model that is still to be pretrained. It changes what a trained model computes, and cannot do otherwise:
    an effective row lies where its expert responds. `ramp_steps` begins with the trained router.

    Until it is folded, save the model as a checkpoint of a training only: its routers are stored under
    `<router>.parametrizations.weight.original`, which no other class reads. To resume, apply first, then load.

    Args:
        model (`torch.nn.Module`):
            Any model with fused experts of transformers: Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V3, GPT-OSS and the like.
        matrix (`str`, *optional*, defaults to `"gate"`):
            Matrix of the experts to iterate with: `"gate"`, `"up"` or `"down"`.
        iters (`int`, *optional*, defaults to `1`):
            Power steps; 0 only brings the rows to their length.
        scale (`float`, *optional*, defaults to `2.0`):
            C': rows have length C' / √N. The paper's sweep at N = 256 has 2 to 8 alike and 1 behind a learned router.
        norm (`float`, *optional*):
            C, the length of the rows, instead of `scale`. The paper has 1.0 for routers with sigmoid scores, as
            DeepSeek-V3's.
        mode (`str`, *optional*, defaults to `"reparam"`):
            `"inplace"`, an experiment, uses the router as it is and iterates it after every optimizer step: call
            [`advance`], or let the callback do it.
        grad (`str`, *optional*, defaults to `"full"`):
            Where gradients go: `"full"`, `"detach_experts"` or `"detach_power"`, see [`effective_router`].
        ramp_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps over which the router goes from the one there is to the effective one. Counted by
            [`advance`].

    Returns:
        `torch.nn.Module`: The same model.

    Raises:
        TypeError: The model has no mixture of experts that is known here, or its experts are quantized.
        ValueError: An option is out of range, a router has rows of zeros, the routers have MPI already, or the model
            is split over processes or uses fused kernels that pass its routers by.
    """
    layers = list(routers(model))
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no layer with fused `experts` beside a `gate` or `router` with a row an "
            "expert."
        )
    if any(layer.mpi is not None for layer in layers):
        raise ValueError(
            f"The routers of this {type(model).__name__} have MPI already: `fold_mpi` makes them ordinary ones."
        )
    if getattr(model, "use_kernels", False):
        raise ValueError("`use_kernels=True` may pass the routers by: load the model without it, or fold it before.")
    options = dict(matrix=matrix, iters=iters, scale=scale, norm=norm, mode=mode, grad=grad, ramp_steps=ramp_steps)
    maps = [EffectiveRouter(model.get_submodule(layer.name), start=layer.learned, **options) for layer in layers]
    for layer, mpi in zip(layers, maps, strict=True):
        check_rows(layer.learned)
        mpi.expert_matrix()
    if getattr(model, "name_or_path", "") and not ramp_steps:
        warnings.warn(
            f"{model.name_or_path!r} was trained with ordinary routers; with MPI it computes something else until it "
            "is trained further. `ramp_steps` makes that gradual.",
            stacklevel=2,
        )
    if any(getattr(layer.router, "norm_topk_prob", True) is False for layer in layers):
        warnings.warn(
            "The weights of the chosen experts are not normalized to a sum of one, as the paper's are: build the "
            "model with `norm_topk_prob=True`.",
            stacklevel=2,
        )
    for layer, mpi in zip(layers, maps, strict=True):
        parametrize.register_parametrization(layer.router, "weight", mpi.train(layer.router.training))
        mpi.add_hooks()
    return model


def advance(model: nn.Module) -> None:
    """Does what follows an optimizer step: iterates routers in place, or goes one step up their ramps. Others stay as
    they are.
    """
    for layer in routers(model):
        if layer.mpi is not None:
            layer.mpi.advance(layer.learned)


@torch.no_grad()
def fold_mpi(model: nn.Module) -> nn.Module:
    """
    Makes an ordinary model of one with MPI, in place: effective routers take the place of the learned ones.

    They are computed in float32 and stored in the dtype of the model. In float32 the logits stay the same, bit for
    bit; in bfloat16 the rounding of the routers may change the choice between experts that are nearly as good. Fold
    before the experts' weights change by other means than training: quantization, merging, averaging.

    A folded model is for inference: `output_router_logits` of its configuration, which trainers switch on and save, is
    switched off, because with it transformers' own classes fail to generate from padded prompts.

    Args:
        model (`torch.nn.Module`):
            A model of one of the MPI classes, or one after [`apply_mpi`].

    Returns:
        `torch.nn.Module`: The same model, of the class that transformers has for it.

    Raises:
        ValueError: Its routers are ordinary ones, have rows of zeros, or its experts have an adapter that is not
            merged.
    """
    layers = [(layer, mpi) for layer in routers(model) if (mpi := layer.mpi) is not None]
    if not layers:
        raise ValueError(
            f"The routers of this {type(model).__name__} are ordinary ones: it is folded already, or `apply_mpi` was "
            "never called."
        )
    # All before any is replaced: an error leaves the model as it was.
    folded = [mpi.folded(layer.learned) for layer, mpi in layers]
    for (layer, mpi), weight in zip(layers, folded, strict=True):
        mpi.remove_hooks()
        if _parametrization(layer.router) is not None:
            parametrize.remove_parametrizations(layer.router, "weight", leave_parametrized=False)
            layer.learned.copy_(weight)
        else:
            del layer.router.mpi
            # The native class has its routers in the dtype of the rest.
            layer.learned.data = weight.to(expert_matrix(layer.experts).dtype)
    for module in model.modules():
        _make_native(module)
    config: Any = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    return model


def _make_native(module: nn.Module) -> None:
    """Gives a module of ours the class that it is built on, and the same to its configuration."""
    native = getattr(type(module), "native_class", None)
    if native is None:
        return
    module.__class__ = native
    module.__dict__.pop("forward", None)  # one that a trainer has put around ours
    if not isinstance(module, PreTrainedModel):
        return
    module._keep_in_fp32_modules_strict = set(native._keep_in_fp32_modules_strict or ())
    # What a model may return is looked up by its class, and put there by the constructor.
    compat.CAN_RECORD_REGISTRY[module] = native._can_record_outputs
    config: Any = module.config
    if hasattr(type(config), "native_class"):
        ours = {field.name for field in fields(config)} - {field.name for field in fields(config.native_class)}
        config.__class__ = config.native_class
        for name in ours | {"auto_map"} & vars(config).keys():
            delattr(config, name)
        config.architectures = None  # saving writes it
