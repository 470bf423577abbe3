"""Hidden-Align: correct rollouts of a prompt share their hidden state before the answer
(https://huggingface.co/papers/2606.03234).

A reconstruction: no code is public, and of the paper only its abstract and summaries were at hand. With C_g the
correct rollouts of group g that have an anchor, m_g of them, u_i = h_i / |h_i| their last hidden states there, and n
the number of groups with m_g ≥ 2,

    L = 1/n Σ_{g: m_g ≥ 2}  1/(m_g (m_g - 1)) Σ_{i ≠ j ∈ C_g} (1 - u_i · u_j)

A trainer sees a group in pieces. So the other half of every pair is a constant, T_i = (Σ_j u_j - u_i) / (m_g - 1),
computed once for a generation: 1/m_g Σ_i (1 - u_i · T_i) has the value of the group's term and half its gradient, and
`target_loss` doubles that.

Shapes: N rollouts in contiguous groups of `group_size`; H hidden size; float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from hf_rb.methods import Method, Metric, Paper, flag


__all__ = ["HiddenAlignFlags", "alignment_targets", "cross_group_cosine", "hidden_align", "target_loss"]


@dataclass
class HiddenAlignFlags:
    """Flags of Hidden-Align."""

    hidden_align_coef: float = flag(
        0.0,
        "Weight of an auxiliary loss that aligns the hidden states before the answers of the correct completions "
        "of a prompt; 0 is off. A reconstruction of https://huggingface.co/papers/2606.03234, without code to "
        "compare with.",
        range="[0, inf)",
    )
    hidden_align_marker: str | None = flag(
        None,
        "Text before which `hidden_align_coef` takes the hidden state. Defaults to what `answer_extractor` looks for.",
    )
    hidden_align_all_correct: bool = flag(
        False, "Whether `hidden_align_coef` aligns groups with correct completions only too, which have no advantage."
    )


def _rules(config: Any) -> Iterator[str]:
    if config.hidden_align_coef > 0 and config.correct_reward is None:
        yield (
            f"`hidden_align_coef: {config.hidden_align_coef}` aligns correct completions. Set `correct_reward` to "
            "the name of the reward function that says which are."
        )
    if config.hidden_align_marker == "":
        yield (
            "`hidden_align_marker` is empty, and a hidden state is taken before it. Write the text with which "
            "answers begin."
        )
    for name, default in (("hidden_align_marker", None), ("hidden_align_all_correct", False)):
        if config.hidden_align_coef == 0 and getattr(config, name) != default:
            yield (
                f"`{name}: {getattr(config, name)}` has no effect with `hidden_align_coef: 0.0`. Set the weight, or "
                "remove it."
            )


def _warnings(config: Any) -> Iterator[str]:
    once = config.steps_per_generation in (None, config.gradient_accumulation_steps)
    if config.hidden_align_coef > 0 and (config.num_iterations > 1 or not once):
        yield (
            "`hidden_align_coef` aligns with states of the policy that wrote the completions, and here it takes "
            "several steps on them: the gradient is exact in the first only."
        )


METHOD = Method(
    key="hidden_align",
    name="Hidden-Align",
    paper=Paper(
        "2606.03234",
        "Right Makes Might: Aligning Verified Hidden States Empowers RL Reasoning",
        "Ziyue Wang, Aomufei Yuan, Yongfu Zhu, Shuai Dong, Wenpu Liu, Yiran Yao, Weichu Xie, Yuqi Xu, Caoyuan Ma,"
        " Wenqi Shao, Xiaoying Zhang, Nan Duan, Jiaqi Wang",
    ),
    summary="An auxiliary loss beside GRPO that pulls together the hidden states from which the correct "
    "completions of a prompt go on to their answer; reconstructed from the abstract.",
    flags=HiddenAlignFlags,
    rules=_rules,
    warnings=_warnings,
    metrics=(
        Metric("hidden_align/cosine", "cosine between aligned completions of a prompt", "[-1, 1]", "higher"),
        Metric("hidden_align/cosine_across", "cosine between aligned completions of different prompts", "[-1, 1]"),
        Metric("hidden_align/aligned", "share of completions that are aligned", "[0, 1]"),
    ),
)


def hidden_align(states: torch.Tensor, aligned: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    The loss on whole groups, with its gradient.

    Args:
        states (`torch.Tensor` of shape `(N, H)`):
            Hidden states at the anchors. Their lengths do not matter.
        aligned (`torch.Tensor` of shape `(N,)` and type `bool`):
            Which rollouts are correct and have an anchor.
        group_size (`int`):
            Rollouts of one prompt; a divisor of N.

    Returns:
        `torch.Tensor`: L, a scalar in [0, 2]; 0 without a group of two.
    """
    unit, count, total = _groups(states, aligned, group_size)
    pairs = count * (count - 1)
    cosine = (total.square().sum(-1) - count) / pairs.clamp(min=1)  # of the pairs of a group, without making them
    has_pairs = pairs > 0
    return torch.where(has_pairs, 1 - cosine, 0).sum() / has_pairs.sum().clamp(min=1)


def alignment_targets(
    states: torch.Tensor, aligned: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits the loss into one term a rollout.

    Args:
        states, aligned, group_size:
            As in [`hidden_align`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: targets T `(N, H)` and weights `(N,)` of the rollouts, detached; the
        weights of a batch with a group of two sum to 1, and are 0 for every rollout that has no other to align with.
    """
    unit, count, total = _groups(states.detach(), aligned, group_size)
    others = (count - 1).repeat_interleave(group_size)
    targets = (total.repeat_interleave(group_size, 0) - unit) / others.clamp(min=1)[:, None]
    per_rollout = torch.where(count > 1, 1 / count.clamp(min=1), 0) / (count > 1).sum().clamp(min=1)
    weights = torch.where(aligned, per_rollout.repeat_interleave(group_size), 0)
    return torch.where(weights[:, None] > 0, targets, 0), weights


def target_loss(states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The part of the loss that some rollouts bring. Over all of them, with targets from the same states, value and
    gradient are those of [`hidden_align`].

    Args:
        states (`torch.Tensor` of shape `(B, H)`):
            Hidden states at the anchors of any B rollouts.
        targets (`torch.Tensor` of shape `(B, H)`), weights (`torch.Tensor` of shape `(B,)`):
            Theirs, from [`alignment_targets`].
    """
    half = (weights * (1 - (normalize(states.float(), dim=-1) * targets).sum(-1))).sum()
    return 2 * half - half.detach()


def cross_group_cosine(states: torch.Tensor, aligned: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    Mean cosine between anchors of different prompts, NaN if there are none: where it grows with that within the
    prompts, the loss aligns what every answer has in common.
    """
    _, count, total = _groups(states, aligned, group_size)
    within, count_within = total.square().sum(), count.square().sum()
    return (total.sum(0).square().sum() - within) / (count.sum().square() - count_within)


def _groups(states: torch.Tensor, aligned: torch.Tensor, group_size: int) -> tuple[torch.Tensor, ...]:
    """Unit vectors (N, H), 0 where not aligned; of each group their number (n,) and their sum (n, H)."""
    unit = torch.where(aligned[:, None], normalize(states.float(), dim=-1), 0)
    return unit, aligned.view(-1, group_size).sum(1).float(), unit.view(-1, group_size, unit.shape[-1]).sum(1)
