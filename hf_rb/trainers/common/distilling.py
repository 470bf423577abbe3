"""Parts that the distillation trainers share: their objective, and the logits that it compares the student with."""

from dataclasses import replace
from typing import Any

import torch

from hf_rb.methods.registry import find
from hf_rb.objectives.objective import Objective, log_prob
from hf_rb.ops.lm_head import TeacherLogits
from hf_rb.trainers.common.token_samples import certainty


__all__ = ["build_objective", "compared_rows", "dense_stats", "init_kwargs_of", "mixed_logits", "sampled_stats"]


def build_objective(args: Any) -> Objective:
    """Returns the objective that a config names, with its flags."""
    return find("objective", args.objective).load().from_config(args)


@torch.no_grad()
def dense_stats(
    objective: Objective, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns what an objective reports of every token, its loss among them, from all logits. Arguments as for
    [`~hf_rb.objectives.objective.Objective.dense`].
    """
    log_q, log_p = (logits.float().log_softmax(-1) for logits in (student_logits, teacher_logits))
    term = objective(log_q, log_p, log_q, tokens)
    return {name: values.float() for name, values in {"loss": term.loss, **term.stats}.items()}


def compared_rows(
    objective: Objective,
    teacher_logits: torch.Tensor,
    reference_logits: torch.Tensor | None,
    tokens: dict[str, torch.Tensor],
) -> torch.Tensor:
    """
    Returns the logits `(N, V)` that an objective compares the student's with, those of the teacher or their mixture
    with the reference's, and adds to `tokens` what a sampled objective reads of teacher and reference.
    """
    if objective.sampled:
        tokens["teacher_logp"] = log_prob(teacher_logits.float().log_softmax(-1), tokens["labels"])
        if reference_logits is not None:
            tokens["reference_logp"] = log_prob(reference_logits.float().log_softmax(-1), tokens["labels"])
    elif reference_logits is not None:
        own, other = objective.mixture
        return own * teacher_logits.float() + other * reference_logits.float()
    return teacher_logits


def mixed_logits(
    objective: Objective, teacher: list[TeacherLogits], reference: list[TeacherLogits]
) -> list[TeacherLogits]:
    """Returns what the tile loop adds up to the logits that an objective compares the student's with."""
    pairs = zip(objective.mixture, (teacher, reference), strict=True)
    return [replace(part, factor=factor * part.factor) for factor, parts in pairs if factor for part in parts]


def sampled_stats(
    objective: Objective, student_logits: torch.Tensor, teacher_logits: torch.Tensor, tokens: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Returns the numbers of [`~hf_rb.trainers.common.token_samples.TokenStats`]: what the objective reports of every
    token, how sure the student is of it, and as `top10` which share of their ten most probable tokens the two have in
    common.
    """
    count = min(10, student_logits.shape[-1])
    top, teacher_top = (logits.topk(count).indices for logits in (student_logits, teacher_logits))
    overlap = (top.unsqueeze(-1) == teacher_top.unsqueeze(-2)).float().sum((-1, -2)) / count
    stats = dense_stats(objective, student_logits, teacher_logits, tokens)
    return {**certainty(student_logits, tokens["labels"]), "top10": overlap, **stats}


def init_kwargs_of(args: Any) -> dict[str, Any]:
    """Returns what `from_pretrained` gets for a teacher or a reference that a config gives by name."""
    return {"trust_remote_code": args.trust_remote_code} | (args.teacher_model_init_kwargs or {})
