"""Adaptive KL: forward and reverse KL weighted by where teacher and student differ
(https://huggingface.co/papers/2404.02657).

At every position the vocabulary is split, in order of falling teacher probability p, into the head H that holds a mass
of μ and the tail. With q the student's distribution,

    g_head = Σ_{i ∈ H} |p_i - q_i|,    g_tail = Σ_{i ∉ H} |p_i - q_i|,    w = g_head / (g_head + g_tail),
    AKL    = w KL(p ‖ q) + (1 - w) KL(q ‖ p).

No gradient flows through w. Both divergences run over the whole vocabulary; head and tail only set the weight.

Two rules for the head: the paper's is the smallest set that reaches μ; the released code's leaves out the token that
crosses μ, unless it is the most probable one.

A cached teacher is known on k tokens, and all others are one event, the rest. It is not a token: it comes last in the
order, however probable it is, and is in the head only where all known tokens together hold less than μ. The head is
then the true one wherever the rest holds at most 1 - μ. Inside the rest, gaps of both signs cancel: g_tail is short by
at most 2 min(r, s), with r and s what teacher and student give to the rest, and w too large accordingly.

Shapes: logits `(..., V)`, student first; results `(...)`, float32.
"""

from dataclasses import dataclass

import torch

from hf_rb.methods import Metric, ObjectiveMethod, Paper, flag
from hf_rb.objectives.divergences import _weighted_sum, forward_kl_rule, log_probs_of, reverse_kl_rule
from hf_rb.objectives.objective import Divergence


__all__ = ["AKL", "AklFlags", "HEAD_RULES", "adaptive_kl", "adaptive_kl_rule", "adaptive_kl_weight"]

HEAD_RULES = ("paper", "code")
# Cumulative sums in float32 land on either side of μ when they should equal it; this much is taken for equal.
_TOLERANCE = 1e-6
# The head of nearly every position is among this many most probable tokens. Where it is not, as many times more are
# looked at.
_CANDIDATES = 64


@dataclass
class AklFlags:
    """Flags of `objective: akl`."""

    akl_mu: float = flag(0.5, "Teacher mass of the head of adaptive KL.", range="(0, 1]")
    akl_head_rule: str = flag(
        "paper",
        "The head of adaptive KL: the smallest set of tokens that reaches `akl_mu` (`paper`), or without the token "
        "that crosses it (`code`, the authors').",
        choices=["paper", "code"],
    )


def adaptive_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mu: float = 0.5,
    head_rule: str = "paper",
    temperature: float = 1.0,
    has_rest: bool = False,
) -> torch.Tensor:
    """
    Adaptive KL divergence at every position.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher.
        mu (`float`, *optional*, defaults to `0.5`):
            Teacher mass of the head, in `(0, 1]`. With 1 the head is the whole vocabulary and the result forward KL.
        head_rule (`str`, *optional*, defaults to `"paper"`):
            `"paper"` or `"code"`, see the module's text.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both.
        has_rest (`bool`, *optional*, defaults to `False`):
            Whether the last column stands for all tokens that the others are not, as in a cached teacher.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence in nats.

    Raises:
        ValueError: `mu` outside `(0, 1]`, an unknown rule, shapes that differ or a temperature that is not positive.
    """
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    weight = _weight(p, q, mu, head_rule, has_rest)[0]
    return weight * _weighted_sum(p, log_p - log_q) + (1 - weight) * _weighted_sum(q, log_q - log_p)


def adaptive_kl_weight(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mu: float = 0.5,
    head_rule: str = "paper",
    temperature: float = 1.0,
    has_rest: bool = False,
) -> torch.Tensor:
    """Returns w of every position, in `[0, 1]` and detached; arguments as for [`adaptive_kl`]."""
    log_q, log_p = log_probs_of(student_logits, teacher_logits, temperature)
    return _weight(log_p.exp(), log_q.exp(), mu, head_rule, has_rest)[0]


def adaptive_kl_rule(
    log_q: torch.Tensor, log_p: torch.Tensor, mu: float = 0.5, head_rule: str = "paper", has_rest: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """
    Returns (loss, c, {"akl_weight", "akl_head_size", "forward_kl", "reverse_kl"}) of [`adaptive_kl`]; see
    `hf_rb.objectives.divergences` for c.
    """
    weight, head_size = _weight(log_p.exp(), log_q.exp(), mu, head_rule, has_rest)
    forward, forward_c = forward_kl_rule(log_q, log_p)
    reverse, reverse_c = reverse_kl_rule(log_q, log_p)
    c = reverse_c.lerp_(forward_c, weight.unsqueeze(-1))
    stats = {"akl_weight": weight, "akl_head_size": head_size, "forward_kl": forward, "reverse_kl": reverse}
    return torch.lerp(reverse, forward, weight), c, stats


def check_head(mu: float, head_rule: str) -> None:
    """Raises `ValueError` unless `mu` is in `(0, 1]` and the rule is known."""
    if not 0 < mu <= 1:
        raise ValueError(f"mu={mu} must be in (0, 1]: it is the teacher's probability mass in the head.")
    if head_rule not in HEAD_RULES:
        raise ValueError(f"head_rule={head_rule!r} is unknown. Choose 'paper' or 'code'.")


@torch.no_grad()
def _weight(
    p: torch.Tensor, q: torch.Tensor, mu: float, head_rule: str, has_rest: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns w and the number of tokens in the head, both `(...)`."""
    check_head(mu, head_rule)
    gap = (p - q).abs_()
    total = gap.sum(-1)
    if mu == 1:
        head, size = total, torch.full_like(total, p.shape[-1])
    else:
        known, known_gap = (part[..., :-1] if has_rest else part for part in (p, gap))
        count = known.shape[-1]
        head, size = _head(known.reshape(-1, count), known_gap.reshape(-1, count), mu, head_rule)
        head, size = head.view_as(total), size.view_as(total)
        if has_rest and head_rule == "paper":  # the code's rule leaves out what crosses μ
            crosses = known.sum(-1) < mu - _TOLERANCE
            head, size = head + crosses * gap[..., -1], size + crosses
    # Equal distributions have no gap and a divergence of zero: any weight will do.
    return torch.where(total > 0, head / total, 0.5).clamp_(max=1), size


def _head(
    p: torch.Tensor, gap: torch.Tensor, mu: float, head_rule: str, candidates: int = _CANDIDATES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gap inside the head and its size, both `(N,)`, for p and gap of shape `(N, V)`."""
    if p.shape[-1] <= candidates:
        return _sorted_head(p, gap, mu, head_rule)
    values, index = p.topk(candidates, dim=-1)
    member = _is_head(values, mu, head_rule)
    size = member.sum(-1)
    # `topk` promises no order among equal values, so a tie across the head's border is left to the stable sort.
    last = values.gather(-1, (size - 1).unsqueeze(-1))
    beyond = values.gather(-1, size.clamp(max=candidates - 1).unsqueeze(-1))
    unsettled = (member[:, -1] | (last == beyond).squeeze(-1)).nonzero().squeeze(-1)
    head, size = (gap.gather(-1, index) * member).sum(-1), size.to(gap.dtype)
    if len(unsettled):
        more = _head(p[unsettled], gap[unsettled], mu, head_rule, candidates * _CANDIDATES)
        head[unsettled], size[unsettled] = more
    return head, size


def _sorted_head(p: torch.Tensor, gap: torch.Tensor, mu: float, head_rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    values, index = p.sort(dim=-1, descending=True, stable=True)
    member = _is_head(values, mu, head_rule)
    return (gap.gather(-1, index) * member).sum(-1), member.sum(-1).to(gap.dtype)


def _is_head(values: torch.Tensor, mu: float, head_rule: str) -> torch.Tensor:
    """Says which of the probabilities, sorted from the largest, are in the head."""
    mass = values.cumsum(-1)
    member = mass - values < mu - _TOLERANCE if head_rule == "paper" else mass < mu + _TOLERANCE
    member[..., 0] = True
    return member


class AKL(Divergence):
    """Adaptive KL as an objective."""

    method = ObjectiveMethod(
        key="akl",
        name="AKL",
        paper=Paper(
            "2404.02657",
            "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
            "Taiqiang Wu, Chaofan Tao, Jiahao Wang, Runming Yang, Zhe Zhao, Ngai Wong",
        ),
        summary="Distillation that weighs forward and reverse KL at every token by where student and teacher differ: "
        "among the teacher's most probable tokens or in its tail.",
        flags=AklFlags,
        mixes=True,
        cached=True,
        metrics=(
            Metric("akl/weight", "AKL weight of the head", "[0, 1]", stat="akl_weight"),
            Metric("akl/head_size", "number of tokens in AKL's head", "[1, inf)", stat="akl_head_size"),
        ),
    )
    flags: AklFlags

    def divergence(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, has_rest: bool = False
    ) -> torch.Tensor:
        flags = self.flags
        return adaptive_kl(student_logits, teacher_logits, flags.akl_mu, flags.akl_head_rule, has_rest=has_rest)

    def with_derivative(
        self, log_q: torch.Tensor, log_p: torch.Tensor, has_rest: bool
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return adaptive_kl_rule(log_q, log_p, self.flags.akl_mu, self.flags.akl_head_rule, has_rest)
