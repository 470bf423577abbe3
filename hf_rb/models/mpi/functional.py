"""The router of MPI, manifold power iteration: what a layer routes with instead of the matrix that it learns.

Row i of a learned router takes one step of power iteration with the Gram matrix of its own expert and is then brought
to a fixed length (the paper's method section, without the iteration over training steps that its prose suggests):

    w_i = C q_i,    q_i = G_iᵀ G_i r_i / max(‖G_iᵀ G_i r_i‖, ε),    C = C' / √N

The router's logits are `x Wᵀ` as ever. Nothing is written back to R: gradients go through the map, to the rows and to
the experts. With g_i the gradient of w_i and v_i = C / ‖G_iᵀ G_i r_i‖ (g_i - (g_i · q_i) q_i),

    ∂L/∂r_i = G_iᵀ G_i v_i,    ∂L/∂G_i = (G_i r_i) v_iᵀ + (G_i v_i) r_iᵀ.

Shapes: N experts, hidden size D, width d of an expert; R and W are `(N, D)`, G is `(N, d, D)` as transformers stores a
gate projection. The products are in the experts' dtype, lengths and directions in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


__all__ = [
    "GRADIENTS",
    "MATRICES",
    "alignment",
    "effective_router",
    "effective_router_and_weight",
    "expert_matrix",
    "matrix_view",
    "power_step",
    "row_length",
    "weight_name",
    "widened",
]

MATRICES = ("gate", "up", "down")
GRADIENTS = ("full", "detach_experts", "detach_power")


def effective_router(
    router_ND: Tensor,
    expert_NdD: Tensor,
    scale: float,
    iters: int = 1,
    *,
    norm: float | None = None,
    eps: float = 1e-12,
    grad: str = "full",
) -> Tensor:
    """
    Computes what a layer routes with (https://huggingface.co/papers/2606.12397).

    Args:
        router_ND (`torch.Tensor` of shape `(N, D)`):
            Learned router R, a row an expert. Its lengths do not matter, its signs do.
        expert_NdD (`torch.Tensor` of shape `(N, d, D)`):
            Matrix of every expert whose Gram matrix on the hidden space is used; see [`expert_matrix`].
        scale (`float`):
            C' of the paper, positive: rows have length C' / √N.
        iters (`int`, *optional*, defaults to `1`):
            Power steps. 0 only brings the rows to their length.
        norm (`float`, *optional*):
            C itself, positive: length of the rows, instead of `scale`.
        eps (`float`, *optional*, defaults to `1e-12`):
            Smallest length that is divided by. A shorter row comes out shorter, and gets no gradient.
        grad (`str`, *optional*, defaults to `"full"`):
            `"full"`, the paper's: to rows and experts. `"detach_experts"`: to the rows only. `"detach_power"`: to the
            rows only, as if a step were the identity before the rows are brought to their length.

    Returns:
        `torch.Tensor` of shape `(N, D)`: Rows of length C, in the dtype of `router_ND`.

    Raises:
        ValueError: A length that is not positive, a negative number of steps, another `grad`, or shapes that do not
            fit.
    """
    return effective_router_and_weight(router_ND, expert_NdD, None, scale, iters, norm=norm, eps=eps, grad=grad)[0]


def effective_router_and_weight(
    router_ND: Tensor,
    weight: Tensor,
    view: Callable[[Tensor], Tensor] | None,
    scale: float,
    iters: int = 1,
    *,
    norm: float | None = None,
    eps: float = 1e-12,
    grad: str = "full",
) -> tuple[Tensor, Tensor]:
    """
    As [`effective_router`], for experts that can be made to use another tensor as their weight.

    The router's gradient has rank two for each expert. Added by itself it would cost three passes over memory of the
    experts' size, which is more than all the rest; added in place to the gradient that comes from the experts it costs
    one. That gradient comes through here where the experts use the weight that is returned. Where they do not, the
    result is the same, and slower.

    Args:
        weight (`torch.Tensor`):
            Weight of the experts.
        view (`Callable`, *optional*):
            Returns the part of such a tensor that is the matrix `(N, d, D)`, as a view; all of it, if not given.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Effective router `(N, D)`, and the weight for the experts to use.
    """
    length = row_length(len(router_ND), scale, norm)
    if iters < 0:
        raise ValueError(f"iters={iters} must be 0 (rows are only brought to their length) or more; the paper has 1.")
    if grad not in GRADIENTS:
        raise ValueError(f"grad={grad!r} must be one of {', '.join(map(repr, GRADIENTS))}.")
    shape = (weight if view is None else view(weight)).shape
    if len(shape) != 3 or (shape[0], shape[2]) != tuple(router_ND.shape):
        raise ValueError(
            f"A router of shape {tuple(router_ND.shape)} needs matrices of shape ({len(router_ND)}, d, "
            f"{router_ND.shape[-1]}); got {tuple(shape)}."
        )
    used, rows = weight if grad == "full" else weight.detach(), router_ND
    # Autocast would copy all experts to its dtype.
    with torch.autocast(router_ND.device.type, enabled=False):
        for step in range(iters):
            target = length if step == iters - 1 else 1.0
            rows, used = _Retracted.apply(rows, used, view, target, eps, grad == "detach_power")
        if not iters:
            wide = widened(rows)
            rows = (length * wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)).to(router_ND.dtype)
    return rows, used if grad == "full" else weight


def row_length(experts: int, scale: float, norm: float | None = None) -> float:
    """
    Returns C, the length of the rows of an effective router.

    Raises:
        ValueError: It is not positive.
    """
    if norm is not None and not norm > 0:
        raise ValueError(f"norm={norm} must be positive: it is C, the length of a router's row.")
    if norm is None and not scale > 0:
        raise ValueError(
            f"scale={scale} must be positive: it is C', and rows have length C' / sqrt(N). The default is 2.0."
        )
    return float(norm if norm is not None else scale / experts**0.5)


def power_step(router_ND: Tensor, expert_NdD: Tensor) -> tuple[Tensor, Tensor]:
    """
    Multiplies every row with the Gram matrix of its expert.

    The product is a sum over the experts' width d: shards of d add up to it, before any length is taken. A shard of
    the experts gives its rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: G r `(N, d)` and GᵀG r `(N, D)`, in the experts' dtype.
    """
    # Rows on the left: in float32 on processors three times faster than a column on the right.
    hidden_Nd = torch.bmm(router_ND.to(expert_NdD.dtype).unsqueeze(1), expert_NdD.mT).squeeze(1)
    return hidden_Nd, torch.bmm(hidden_Nd.unsqueeze(1), expert_NdD).squeeze(1)


class _Retracted(torch.autograd.Function):
    """One power step and the return to a length, with the gradient in closed form: it keeps vectors only, no
    matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        router_ND: Tensor,
        weight: Tensor,
        view: Callable[[Tensor], Tensor] | None,
        length: float,
        eps: float,
        straight_through: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden_Nd, rows_ND = power_step(router_ND, weight if view is None else view(weight))
        rows_ND = widened(rows_ND)
        norms_N1 = rows_ND.norm(dim=-1, keepdim=True)
        directions_ND = rows_ND / norms_N1.clamp_min(eps)
        ctx.save_for_backward(router_ND, weight, hidden_Nd, directions_ND, norms_N1)
        ctx.view, ctx.length, ctx.eps, ctx.straight_through = view, length, eps, straight_through
        ctx.set_materialize_grads(False)
        return (length * directions_ND).to(router_ND.dtype), weight

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  (the decorator hides the names of parameters)
        ctx: Any, grad_ND: Tensor | None, grad_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_ND is None:
            return None, grad_weight, None, None, None, None
        router_ND, weight, hidden_Nd, directions_ND, norms_N1 = ctx.saved_tensors
        grad_ND = grad_ND.to(directions_ND.dtype)
        radial_N1 = (grad_ND * directions_ND).sum(-1, keepdim=True)
        tangent_ND = torch.where(
            norms_N1 > ctx.eps, ctx.length / norms_N1 * (grad_ND - radial_N1 * directions_ND), 0.0
        )
        if ctx.straight_through:
            return tangent_ND.to(router_ND.dtype), None, None, None, None, None
        view = ctx.view
        pushed_Nd, grad_router_ND = power_step(tangent_ND, weight if view is None else view(weight))
        if ctx.needs_input_grad[1]:
            left_Nd2 = torch.stack((hidden_Nd, pushed_Nd), dim=-1)
            right_N2D = torch.stack((tangent_ND, widened(router_ND)), dim=1).to(weight.dtype)
            if view is not None:
                grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
                view(grad_weight).baddbmm_(left_Nd2, right_N2D)
            else:
                grad_NdD = left_Nd2 @ right_N2D
                grad_weight = grad_NdD if grad_weight is None else grad_weight + grad_NdD
        return grad_router_ND.to(router_ND.dtype), grad_weight, None, None, None, None


def widened(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def alignment(router_ND: Tensor, expert_NdD: Tensor) -> Tensor:
    """
    Measures how far the rows of a router point where their experts respond most: λ = ‖G r‖ / (‖r‖ ‖G‖₂) in `[0, 1]`.

    A power step never lowers it, whatever the row was. So compare three: the learned router, the effective one, and
    one power step on random rows.

    Args:
        router_ND (`torch.Tensor` of shape `(N, D)`):
            Router, learned or effective.
        expert_NdD (`torch.Tensor` of shape `(N, d, D)`):
            Matrix of every expert.

    Returns:
        `torch.Tensor` of shape `(N,)`: λ of every expert, float32 (float64 where that is given). NaN for a row or a
        matrix of zeros.
    """

    def ratio(row_D: Tensor, matrix_dD: Tensor) -> Tensor:
        row_D, matrix_dD = widened(row_D), widened(matrix_dD)
        return (matrix_dD @ row_D).norm() / (row_D.norm() * torch.linalg.matrix_norm(matrix_dD, 2))

    # An expert at a time: all of them in float32 would be a second copy of the layer.
    return torch.stack([ratio(row, matrix) for row, matrix in zip(router_ND, expert_NdD, strict=True)])


def expert_matrix(experts: nn.Module, matrix: str = "gate") -> Tensor:
    """
    Returns the matrix of every expert that MPI iterates with, as a view of the weights, whatever their layout.

    Args:
        experts (`nn.Module`):
            Fused experts of transformers, which say by `has_gate`, `is_transposed` and `is_concatenated` how they
            store weights.
        matrix (`str`, *optional*, defaults to `"gate"`):
            `"gate"` is the paper's, `"up"` and `"down"` its ablations. Experts without a gate have `"up"` in its
            place.

    Returns:
        `torch.Tensor` of shape `(N, d, D)`: View, through which gradients reach the weights.

    Raises:
        ValueError: Another `matrix`, or weights that are split over processes or not loaded.
        TypeError: Experts of another kind: adapted, quantized, or not fused.
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix={matrix!r} must be one of {', '.join(map(repr, MATRICES))}.")
    return matrix_view(experts, matrix, getattr(experts, weight_name(experts, matrix)))


def weight_name(experts: nn.Module, matrix: str) -> str:
    """Returns the name of the parameter in which experts keep a matrix, or raises where they have none."""
    kind = type(experts).__name__
    if hasattr(experts, "base_layer"):
        raise TypeError(f"{kind} adapts the experts' weights; merge the adapter first (`merge_and_unload()`).")
    flags = ("has_gate", "is_transposed", "is_concatenated")
    if not all(isinstance(getattr(experts, flag, None), bool) for flag in flags):
        raise TypeError(
            f"{kind} is no fused experts module of transformers (it has no {', '.join(flags)}), so its matrices are "
            "not known here."
        )
    name = "down_proj" if matrix == "down" else "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)
    if not weight.is_floating_point():
        raise TypeError(
            f"{kind} has quantized weights ({weight.dtype}); fold the routers first (`fold_mpi`), then quantize."
        )
    if hasattr(weight, "device_mesh") or getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{kind}.{name} is split over processes, and a power step needs it whole: tensor and expert parallelism "
            "are not supported before `fold_mpi`. Train with data parallelism (FSDP2 gathers a layer before its "
            "router runs)."
        )
    if weight.ndim != 3:
        raise ValueError(
            f"{kind}.{name} has shape {tuple(weight.shape)}, expected three dimensions: with DeepSpeed ZeRO-3, name "
            "the MoE block's class in `transformer_moe_cls_names`, so that its experts are gathered when the router "
            "needs them."
        )
    return name


def matrix_view(experts: nn.Module, matrix: str, weight: Tensor) -> Tensor:
    """Returns the part of a weight of experts that is one matrix, `(N, d, D)`."""
    if matrix == "down":
        return weight if experts.is_transposed else weight.mT
    weight = weight.mT if experts.is_transposed else weight
    if not experts.has_gate:
        return weight
    second = matrix == "up"
    if experts.is_concatenated:
        return weight.chunk(2, dim=1)[second]
    return weight[:, second::2]
