"""Parameter groups for an optimizer: what decays, and that a router's length means nothing."""

from typing import Any

from torch import nn

from hf_rb.models.mpi.conversion import routers


__all__ = ["weight_decay_groups"]


def weight_decay_groups(
    model: nn.Module, weight_decay: float = 0.1, router_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """
    Returns the trained parameters in groups for an optimizer: matrices decay; norms, biases and other vectors do not;
    routers have a decay of their own.

    An MPI router is brought to a fixed length whatever length its learned matrix has, and its gradient is orthogonal
    to that matrix. Weight decay hence cannot regularize it: shorter rows only turn faster at the same learning rate.
    An ordinary router can want a decay; give it the same as the matrices then.

    Args:
        model (`torch.nn.Module`):
            Mixture of experts, with MPI or without.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            Decay of the matrices, embeddings and experts among them.
        router_weight_decay (`float`, *optional*, defaults to `0.0`):
            Decay of the learned routers.

    Returns:
        `list[dict]`: Groups with `params` and `weight_decay`, for `torch.optim.AdamW` and the like. To a trainer give
        `optimizers=(torch.optim.AdamW(groups, lr=...), None)`.

    Raises:
        ValueError: A decay is negative.
    """
    for name, value in (("weight_decay", weight_decay), ("router_weight_decay", router_weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more.")
    learned = {id(layer.learned) for layer in routers(model)}
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], router_weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = router_weight_decay if id(parameter) in learned else weight_decay if parameter.ndim > 1 else 0.0
            groups[decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
