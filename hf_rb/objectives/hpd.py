"""HPD: hybrid policy distillation on a fixed sequence and one student draw a position
(https://huggingface.co/papers/2604.20244).

At a position with label y, teacher p, student q and a token a drawn from q,

    k(v) = q(v) (log p(v) - log q(v))
    w_y  = k(y)             if k(y) < 0
         = 2 p(y) + k(y)    if k(y) > 0 and k(a) < 0     (what is taken from a is sent to y)
         = p(y) + k(y)      otherwise
    w_a  = [a ≠ y] [k(a) < 0] k(a)
    loss = - w_y log q(y) - w_a log q(a)

The weights are constants for the gradient. At k(y) = 0 the paper's equations 12 and 14 disagree and the two released
implementations follow neither throughout; we take equation 14 and algorithm 1: w_y = p(y).

Signs are taken from log p - log q, because k underflows to 0 for improbable tokens. A teacher log-probability below
-87 (the smallest normal float32) counts as -87, which keeps w finite where the teacher excludes a token.

Shapes: logits `(..., V)`, labels and samples `(...)`; float32.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hf_rb.methods import Metric, ObjectiveMethod, Paper, flag
from hf_rb.objectives.objective import Objective, Tokens, given, log_prob, monitored
from hf_rb.objectives.token_rule import Term


__all__ = ["HPD", "HpdFlags", "hpd_loss", "hpd_rule", "hpd_weights", "inverse_cdf_sample"]

_FLOOR = -87.0


@dataclass
class HpdFlags:
    """Flags of `objective: hpd`."""

    hpd_sample: bool = flag(
        True, "Whether HPD draws a token from the student at every position; `False` is the paper's ablation."
    )
    hpd_reinforce: bool = flag(
        True, "Whether HPD sends the mass taken from the drawn token to the label; `False` is the paper's ablation."
    )


def hpd_weights(
    student_logp: torch.Tensor,
    teacher_logp: torch.Tensor,
    sample_student_logp: torch.Tensor,
    sample_teacher_logp: torch.Tensor,
    sample_is_label: torch.Tensor,
    sample: bool = True,
    reinforce: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights of the label and of the sampled token (equations 10-14).

    Args:
        student_logp (`torch.Tensor` of shape `(...)`):
            log q(y) of the label.
        teacher_logp (`torch.Tensor` of shape `(...)`):
            log p(y) of the label.
        sample_student_logp (`torch.Tensor` of shape `(...)`):
            log q(a) of the sampled token.
        sample_teacher_logp (`torch.Tensor` of shape `(...)`):
            log p(a) of the sampled token.
        sample_is_label (`torch.Tensor` of shape `(...)` and type `bool`):
            Whether a = y.
        sample (`bool`, *optional*, defaults to `True`):
            Whether the sampled token takes part; `False` is the paper's ablation without sampling.
        reinforce (`bool`, *optional*, defaults to `True`):
            Whether mass taken from the sampled token is sent to the label; `False` is the paper's ablation.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `(w_label, w_sample)`, detached; w_label ≤ (2 + 1/e) p(y), w_sample ≤ 0.
    """
    ratio, gap, p = _gap(student_logp, teacher_logp)
    sample_ratio, sample_gap, _ = _gap(sample_student_logp, sample_teacher_logp)
    suppressed = (sample_ratio < 0) & sample
    doubled = suppressed & (ratio > 0) & reinforce
    w_label = gap + torch.where(ratio < 0, 0.0, p) + torch.where(doubled, p, 0.0)
    w_sample = torch.where(suppressed & ~sample_is_label, sample_gap, 0.0)
    return w_label, w_sample


def _gap(student_logp: torch.Tensor, teacher_logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns log p - log q, k and p."""
    log_q, log_p = student_logp.detach().float(), teacher_logp.detach().float().clamp(min=_FLOOR)
    ratio = log_p - log_q
    # A token of no student probability has k = 0, not 0 times infinity.
    return ratio, torch.where(log_q > -torch.inf, log_q.exp() * ratio, 0.0), log_p.exp()


def hpd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    samples: torch.Tensor,
    sample: bool = True,
    reinforce: bool = True,
) -> torch.Tensor:
    """
    HPD loss of every position (equation 11 and algorithm 1, one term).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the student; row t predicts `labels[t]`.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Logits of the teacher.
        labels (`torch.Tensor` of shape `(...)`):
            Token ids; -100 gives a loss of 0 and no gradient.
        samples (`torch.Tensor` of shape `(...)`):
            Token ids drawn from the student, for example by [`inverse_cdf_sample`].
        sample, reinforce (`bool`, *optional*, default to `True`):
            See [`hpd_weights`].

    Returns:
        `torch.Tensor` of shape `(...)`: Loss.
    """
    ignored = labels == -100
    pair = torch.stack([labels.masked_fill(ignored, 0), samples], dim=-1)
    # Ignored rows are zeroed before the softmax, so that nothing they hold can reach a gradient.
    log_q = torch.log_softmax(student_logits.float().masked_fill(ignored.unsqueeze(-1), 0), dim=-1).gather(-1, pair)
    log_p = torch.log_softmax(teacher_logits.detach().float(), dim=-1).gather(-1, pair)
    w_label, w_sample = hpd_weights(
        log_q[..., 0], log_p[..., 0], log_q[..., 1], log_p[..., 1], labels == samples, sample, reinforce
    )
    loss = -(w_label * log_q[..., 0] + w_sample * log_q[..., 1])
    return torch.where(ignored, 0.0, loss)


def hpd_rule(
    log_q: torch.Tensor,
    log_p: torch.Tensor,
    labels: torch.Tensor,
    samples: torch.Tensor,
    sample: bool = True,
    reinforce: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns (loss, c, weights) of [`hpd_loss`] for labels that are all token ids; c is sparse, given as `(2, N)`
    values.
    """
    pair = torch.stack([labels, samples], dim=-1)
    picked_q, picked_p = log_q.gather(-1, pair), log_p.gather(-1, pair)
    w_label, w_sample = hpd_weights(
        picked_q[..., 0], picked_p[..., 0], picked_q[..., 1], picked_p[..., 1], labels == samples, sample, reinforce
    )
    loss = -(w_label * picked_q[..., 0] + w_sample * picked_q[..., 1])
    return loss, -torch.stack([w_label, w_sample]), {"hpd_w_label": w_label, "hpd_w_sample": w_sample}


def inverse_cdf_sample(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draws one token a position by inverting the cumulative distribution.

    Args:
        probs (`torch.Tensor` of shape `(..., V)`):
            Probabilities, up to a common factor.
        uniforms (`torch.Tensor` of shape `(...)`):
            One number from [0, 1) a position.

    Returns:
        `torch.Tensor` of shape `(...)`: Token ids. A token without probability is never drawn.
    """
    cumulative = probs.float().cumsum(-1)
    total = cumulative[..., -1:]
    # u times the total can round up to the total, which no token's cumulative sum exceeds.
    target = torch.minimum(uniforms.to(total).unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


class HPD(Objective):
    """HPD as an objective. Reads `tokens["labels"]` and `tokens["uniforms"]`."""

    method = ObjectiveMethod(
        key="hpd",
        name="HPD",
        paper=Paper(
            "2604.20244",
            "Hybrid Policy Distillation for LLMs",
            "Wenhong Zhu, Ruobing Xie, Rui Wang, Pengfei Liu",
        ),
        summary="Distillation on fixed text that also draws one token from the student at every position and lowers "
        "it where the student overrates it.",
        flags=HpdFlags,
        completions="dataset",
        because="it trains on the completions of the dataset",
        metrics=(
            Metric("hpd/label_weight", "HPD weight of the label", stat="hpd_w_label", extremes=True),
            Metric("hpd/sample_weight", "HPD weight of the draw", "(-inf, 0]", stat="hpd_w_sample", extremes=True),
            Metric(
                "hpd/overestimated_fraction", "share of labels that HPD lowers", "[0, 1]", stat="hpd_overestimated"
            ),
            Metric("hpd/suppressed_fraction", "share of lowered draws", "[0, 1]", stat="hpd_suppressed"),
            Metric(
                "hpd/reinforced_fraction",
                "share of tokens where the label gets what is taken from the draw",
                "[0, 1]",
                stat="hpd_reinforced",
            ),
        ),
    )
    flags: HpdFlags
    draws = True
    vanishes = False

    def __init__(self, monitor: bool = True, **flags: Any):
        super().__init__(**flags)
        self.monitor = monitor

    def __call__(
        self, log_q: torch.Tensor, log_p: torch.Tensor | None, log_probs: torch.Tensor, tokens: Tokens
    ) -> Term:
        labels, log_p, flags = tokens["labels"], given(log_p), self.flags
        more = monitored(log_q, log_p, log_probs) if self.monitor else {}
        samples = inverse_cdf_sample(log_q.exp(), tokens["uniforms"])
        loss, values, stats = hpd_rule(log_q, log_p, labels, samples, flags.hpd_sample, flags.hpd_reinforce)
        # The branches: the label's probability is too high; so is that of the drawn token; what is taken goes to the
        # label.
        stats["hpd_overestimated"] = stats["hpd_w_label"] < 0
        if flags.hpd_sample:
            stats["hpd_suppressed"] = stats["hpd_w_sample"] < 0
        if flags.hpd_sample and flags.hpd_reinforce:
            stats["hpd_reinforced"] = (stats["hpd_w_label"] > 0) & stats["hpd_suppressed"]
        stats |= {"nll": -log_prob(log_probs, labels), **more}
        return Term(loss, None, torch.stack([labels, samples], dim=-1), values.T, stats)

    def dense(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        samples = inverse_cdf_sample(student_logits.detach().float().log_softmax(-1).exp(), tokens["uniforms"])
        sample, reinforce = self.flags.hpd_sample, self.flags.hpd_reinforce
        return hpd_loss(student_logits, teacher_logits, tokens["labels"], samples, sample, reinforce)
