"""Skewed KL: divergences to a mixture of teacher and student (DistiLLM, https://huggingface.co/papers/2402.03898,
section 3.1).

With p the teacher's distribution, q the student's and α in `[0, 1)`,

    forward = KL(p ‖ α p + (1 - α) q),
    reverse = KL(q ‖ (1 - α) p + α q).

α = 0 gives forward and reverse KL. Above 0 both are at most -log α: a token that one of the two excludes costs no
infinite loss.

Shapes: logits `(..., V)`, student first; results `(...)`, float32.
"""

import math
from dataclasses import dataclass

import torch

from hf_rb.methods import ObjectiveMethod, Paper, flag
from hf_rb.objectives.divergences import _weighted_sum, log_probs_of
from hf_rb.objectives.objective import Divergence


__all__ = ["SkewedKL", "SkewedKlFlags", "skewed_kl"]


@dataclass
class SkewedKlFlags:
    """Flags of `objective: skewed_kl`."""

    skewed_kl_alpha: float = flag(
        0.1,
        "Share in the mixture of the distribution that comes first, the teacher's in the forward direction. 0 is "
        "forward or reverse KL; 0.1 is the paper's.",
        range="[0, 1)",
    )
    skewed_kl_direction: str = flag(
        "forward",
        "Direction of skewed KL: from the teacher to the mixture (`forward`), or from the student (`reverse`).",
        choices=["forward", "reverse"],
    )


def skewed_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    alpha: float = 0.1,
    direction: str = "forward",
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    Skewed KL at every position.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher.
        alpha (`float`, *optional*, defaults to `0.1`):
            α in `[0, 1)`.
        direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"`, KL(p ‖ α p + (1 - α) q), or `"reverse"`, KL(q ‖ (1 - α) p + α q).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence in nats.

    Raises:
        ValueError: `alpha` outside `[0, 1)`, an unknown direction, shapes that differ, or a temperature that is not
            positive.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must be in [0, 1): at 1 the divergence is 0 everywhere.")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r} is unknown. Choose 'forward' or 'reverse'.")
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    mixture = second
    if alpha > 0:
        mixture = torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
    return _weighted_sum(first.exp(), first - mixture)


class SkewedKL(Divergence):
    """Skewed KL as an objective."""

    method = ObjectiveMethod(
        key="skewed_kl",
        name="Skewed KL",
        paper=Paper(
            "2402.03898",
            "DistiLLM: Towards Streamlined Distillation for Large Language Models",
            "Jongwoo Ko, Sungnyun Kim, Tianyi Chen, Se-Young Yun",
        ),
        summary="Distillation by the KL divergence to a mixture of teacher and student, which is bounded.",
        flags=SkewedKlFlags,
        mixes=True,
    )
    flags: SkewedKlFlags

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        flags = self.flags
        return skewed_kl(student_logits, teacher_logits, flags.skewed_kl_alpha, flags.skewed_kl_direction)
