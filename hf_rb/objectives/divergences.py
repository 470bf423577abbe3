"""Kullback-Leibler and Jensen-Shannon divergences between next-token distributions.

With p the teacher's and q the student's distribution over the vocabulary, both a softmax at temperature T:

    forward_kl = KL(p ‖ q) = Σ p (log p - log q)
    reverse_kl = KL(q ‖ p) = Σ q (log q - log p)
    jsd_β      = β KL(p ‖ m) + (1 - β) KL(q ‖ m),    m = β p + (1 - β) q

Generalized JSD is GKD's (https://huggingface.co/papers/2306.13649) in TRL's convention: β = 0 is `forward_kl`, β = 1
is `reverse_kl`. There is no T² factor.

Shapes: logits `(..., V)`, student first; results `(...)`, one divergence a position, float32. Nothing shifts: row t is
compared with row t. No gradient reaches the teacher.

Each divergence also has a *rule*, used where the logits of all tokens do not fit into memory (`hf_rb.ops.lm_head`): it
takes log-probabilities and returns the loss with its derivative c = ∂loss/∂(log q), so that ∂loss/∂z = c - q Σc for
the logits z.
"""

import math

import torch


__all__ = ["forward_kl", "forward_kl_rule", "jsd", "jsd_rule", "log_probs_of", "reverse_kl", "reverse_kl_rule"]


def log_probs_of(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (log q, log p) in float32; the teacher's are detached."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape: cut both to the ids that the two vocabularies share."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0.")
    log_q = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    return log_q, torch.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)


def _weighted_sum(probs: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    # What has no probability adds nothing, even where its log-ratio is infinite.
    return torch.where(probs > 0, probs * log_ratio, 0).sum(-1)


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(teacher ‖ student) at every position.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher. A logit of -inf is a token that the teacher excludes; it adds nothing.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence in nats.

    Raises:
        ValueError: The shapes differ, or the temperature is not positive.
    """
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    return _weighted_sum(log_p.exp(), log_p - log_q)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(student ‖ teacher) at every position; arguments and result as for [`forward_kl`].

    Infinite where the teacher excludes a token (logit -inf) that the student does not.
    """
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    return _weighted_sum(log_q.exp(), log_q - log_p)


def jsd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence at every position; `beta` in `[0, 1]`, the rest as for [`forward_kl`]."""
    check_beta(beta)
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature)
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _weighted_sum(log_p.exp(), log_p - log_m) + (1 - beta) * _weighted_sum(log_q.exp(), log_q - log_m)


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be in [0, 1]: 0 is forward KL, 1 is reverse KL.")


def forward_kl_rule(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, c) of [`forward_kl`]; both inputs `(..., V)`, loss `(...)`."""
    p = log_p.exp()
    return _weighted_sum(p, log_p - log_q), p.neg_()


def reverse_kl_rule(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, c) of [`reverse_kl`]."""
    q = log_q.exp()
    log_ratio = (log_q - log_p).masked_fill_(q == 0, 0)  # what has no probability adds nothing
    return (q * log_ratio).sum(-1), q.mul_(log_ratio + 1)


def jsd_rule(log_q: torch.Tensor, log_p: torch.Tensor, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, c) of [`jsd`]."""
    if beta == 0:
        return forward_kl_rule(log_q, log_p)
    if beta == 1:
        return reverse_kl_rule(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    q, log_ratio = log_q.exp(), log_q - log_m
    loss = beta * _weighted_sum(log_p.exp(), log_p - log_m) + (1 - beta) * _weighted_sum(q, log_ratio)
    return loss, q.mul_(log_ratio).mul_(1 - beta)
