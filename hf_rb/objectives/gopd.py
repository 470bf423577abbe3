"""G-OPD: on-policy distillation with a reward scale; above 1 it extrapolates (ExOPD,
https://huggingface.co/papers/2602.12125).

With q the student, T the teacher and R the reference, all read at a token y that the student has drawn, the advantage
of y is

    A = sg[λ (log T - log R) - (log q - log R)]

and the loss -A ρ with ρ = q / sg[q], which is 1 in value. The paper's equation 14 prints -A, a cost, under a maximum;
the released code negates it, as here. λ = 1 is ordinary on-policy distillation, where R cancels and is not needed. At
every state the expected gradient is that of KL(q ‖ M), M ∝ T^λ R^(1-λ).

Shapes: `(...)`, one entry a token; float32. Nothing is whitened or clipped: that would erase the signal.
"""

import torch


__all__ = ["gopd_advantage"]


def gopd_advantage(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    reference_logp: torch.Tensor | None,
    reward_scale: float = 1.0,
) -> torch.Tensor:
    """
    Advantage of every sampled token (the negative of equation 14).

    Args:
        student_logp (`torch.Tensor` of shape `(...)`):
            log q of the token.
        teacher_logp (`torch.Tensor` of shape `(...)`):
            log T of the token.
        reference_logp (`torch.Tensor` of shape `(...)` or `None`):
            log R of the token. May be `None` if and only if `reward_scale` is 1, where it cancels.
        reward_scale (`float`, *optional*, defaults to `1.0`):
            λ: the paper uses 1 (OPD) and 1.25 (ExOPD).

    Returns:
        `torch.Tensor` of shape `(...)`: Advantage, detached.

    Raises:
        ValueError: A scale other than 1 without a reference.
    """
    student_logp, teacher_logp = student_logp.detach().float(), teacher_logp.detach().float()
    advantage = teacher_logp - student_logp
    if reward_scale == 1:
        return advantage
    if reference_logp is None:
        raise ValueError(
            f"reward_scale={reward_scale} needs the reference's log-probabilities: only at 1 does the reference "
            "cancel."
        )
    return advantage + (reward_scale - 1) * (teacher_logp - reference_logp.detach().float())
