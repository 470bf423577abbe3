"""Parts that the distillation trainers share: the token rule of an objective, and its formulas on all logits."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from hf_rb.objectives.akl import adaptive_kl
from hf_rb.objectives.divergences import forward_kl, jsd, reverse_kl
from hf_rb.objectives.gopd import gopd_advantage
from hf_rb.objectives.hpd import hpd_loss, inverse_cdf_sample
from hf_rb.objectives.loca import loca_calibrate
from hf_rb.ops.rules import DivergenceRule, GopdRule, HpdRule, ObjectiveRule
from hf_rb.trainers.common.token_samples import certainty


__all__ = [
    "build_rule",
    "compared_rows",
    "dense_losses",
    "dense_stats",
    "init_kwargs_of",
    "log_prob",
    "sampled_stats",
]


def build_rule(args: Any) -> ObjectiveRule:
    """Returns the token rule of a config's objective."""
    if args.objective == "hpd":
        return HpdRule(args.hpd_sample, args.hpd_reinforce)
    if args.objective == "gopd" and not args.gopd_full_vocab:
        return GopdRule(args.reward_scale, args.gopd_tis_cap, args.gopd_logratio_clamp)
    return DivergenceRule(
        "reverse_kl" if args.objective == "gopd" else args.objective,
        args.beta,
        args.akl_mu,
        args.akl_head_rule,
        getattr(args, "kd_alpha", 1.0),
        getattr(args, "loca_alpha", None),
    )


def dense_losses(
    rule: ObjectiveRule, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> torch.Tensor:
    """
    Returns the loss of every token by the formulas on all logits, for autograd: what a rule in the tile loop must
    equal.

    Args:
        rule (`ObjectiveRule`):
            From [`build_rule`].
        student_logits, teacher_logits (`torch.Tensor` of shape `(N, V)`):
            Logits.
        tokens (`dict[str, torch.Tensor]`):
            What the rule reads, N rows each.
    """
    labels, has_rest = tokens["labels"], "rest" in tokens
    if isinstance(rule, HpdRule):
        samples = inverse_cdf_sample(student_logits.detach().float().log_softmax(-1).exp(), tokens["uniforms"])
        return hpd_loss(student_logits, teacher_logits, labels, samples, rule.sample, rule.reinforce)
    if isinstance(rule, GopdRule):
        log_q = -cross_entropy(student_logits.float(), labels, reduction="none")
        teacher, reference = rule.clamped(log_q.detach(), tokens["teacher_logp"], tokens.get("reference_logp"))
        advantage = gopd_advantage(log_q, teacher, reference, rule.reward_scale)
        return -advantage * (log_q - log_q.detach()).exp()
    if rule.loca_alpha is not None:
        teacher_logits = loca_calibrate(teacher_logits.float().softmax(-1), labels, rule.loca_alpha, has_rest).log()
    losses = {
        "jsd": lambda: jsd(student_logits, teacher_logits, rule.beta),
        "forward_kl": lambda: forward_kl(student_logits, teacher_logits),
        "reverse_kl": lambda: reverse_kl(student_logits, teacher_logits),
        "akl": lambda: adaptive_kl(student_logits, teacher_logits, rule.akl_mu, rule.akl_head_rule, has_rest=has_rest),
    }[rule.objective]()
    if rule.kd_alpha == 1:
        return losses
    nll = cross_entropy(student_logits.float(), labels, reduction="none")
    return rule.kd_alpha * losses + (1 - rule.kd_alpha) * nll


@torch.no_grad()
def dense_stats(
    rule: ObjectiveRule, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns what a rule reports of every token, its loss among them, from all logits. Arguments as for
    [`dense_losses`].
    """
    log_q, log_p = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
    term = rule(log_q, log_p, log_q, tokens)
    return {"loss": term.loss, **term.stats}


def compared_rows(
    args: Any, teacher_logits: torch.Tensor, reference_logits: torch.Tensor | None, tokens: dict[str, torch.Tensor]
) -> torch.Tensor:
    """
    Returns the logits `(N, V)` that a config's objective compares the student's with, those of the teacher or G-OPD's
    mixture, and adds to `tokens` what the sampled G-OPD reads of teacher and reference.
    """
    if args.objective != "gopd":
        return teacher_logits
    if not args.gopd_full_vocab:
        tokens["teacher_logp"] = log_prob(teacher_logits, tokens["labels"])
        if reference_logits is not None:
            tokens["reference_logp"] = log_prob(reference_logits, tokens["labels"])
    elif reference_logits is not None:
        return args.reward_scale * teacher_logits.float() + (1 - args.reward_scale) * reference_logits.float()
    return teacher_logits


def sampled_stats(
    rule: ObjectiveRule, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Returns the numbers of [`~hf_rb.trainers.common.token_samples.TokenStats`]: what the rule reports of every token,
    how sure the student is of it, and as `top10` which share of their ten most probable tokens the two have in common.
    """
    count = min(10, student_logits.shape[-1])
    top, teacher_top = (logits.topk(count).indices for logits in (student_logits, teacher_logits))
    overlap = (top.unsqueeze(-1) == teacher_top.unsqueeze(-2)).float().sum((-1, -2)) / count
    stats = dense_stats(rule, student_logits, teacher_logits, tokens)
    return {**certainty(student_logits, tokens["labels"]), "top10": overlap, **stats}


def init_kwargs_of(args: Any) -> dict[str, Any]:
    """Returns what `from_pretrained` gets for a teacher or a reference that a config gives by name."""
    return {"trust_remote_code": args.trust_remote_code} | (args.teacher_model_init_kwargs or {})


def log_prob(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities `(N,)` of labels `(N,)` by logits `(N, V)`."""
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
