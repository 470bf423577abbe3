"""The divergences without a paper of this family: TRL's generalized Jensen-Shannon divergence and its two ends."""

from typing import Any

import torch

from hf_rb.methods import ObjectiveMethod
from hf_rb.objectives.divergences import forward_kl, forward_kl_rule, jsd, jsd_rule, reverse_kl, reverse_kl_rule
from hf_rb.objectives.objective import Divergence


__all__ = ["ForwardKL", "JSD", "ReverseKL"]


class JSD(Divergence):
    """Generalized Jensen-Shannon divergence with TRL's `beta` in `[0, 1]`."""

    method = ObjectiveMethod(
        key="jsd",
        name="JSD",
        summary="TRL's generalized Jensen-Shannon divergence with its `beta`.",
        mixes=True,
        own=("beta",),
    )

    def __init__(self, beta: float = 0.5, **options: Any):
        super().__init__(**options)
        self.beta = beta

    @classmethod
    def options(cls, args: Any) -> dict[str, Any]:
        return super().options(args) | {"beta": args.beta}

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        return jsd(student_logits, teacher_logits, self.beta)

    def with_derivative(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return *jsd_rule(log_q, log_p, self.beta), {}


class ForwardKL(Divergence):
    """KL(teacher ‖ student)."""

    method = ObjectiveMethod(
        key="forward_kl", name="Forward KL", summary="KL(teacher ‖ student).", mixes=True, cached=True
    )

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        return forward_kl(student_logits, teacher_logits)

    def with_derivative(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss, derivative = forward_kl_rule(log_q, log_p)
        return loss, derivative, {"forward_kl": loss}


class ReverseKL(Divergence):
    """KL(student ‖ teacher)."""

    method = ObjectiveMethod(key="reverse_kl", name="Reverse KL", summary="KL(student ‖ teacher).", mixes=True)

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        return reverse_kl(student_logits, teacher_logits)

    def with_derivative(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss, derivative = reverse_kl_rule(log_q, log_p)
        return loss, derivative, {"reverse_kl": loss}
