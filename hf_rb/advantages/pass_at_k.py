"""Pass@k advantages: a group is rewarded for one correct completion among k (https://huggingface.co/papers/2508.10751,
the analytical derivation).

Of the N scored completions of a prompt n are wrong. Over all subsets of k of them, with a reward of 1 where one is
correct,

    R̄  = 1 - C(n, k) / C(N, k),    σ = √(R̄ (1 - R̄)),
    A⁺ = (1 - R̄) / σ,              A⁻ = (1 - R̄ - C(n-1, k-1) / C(N-1, k-1)) / σ.

A⁺ is the advantage of a correct completion, A⁻ of a wrong one. Where σ = 0 (fewer than k wrong ones, or no correct
one) the group carries no signal and its advantages are 0. k = 1 is GRPO with the population's standard deviation. Of a
group with fewer than k scored completions the advantages are 0 too, and R̄ says whether one is correct.

The advantages take the place of GRPO's: other rewards, their weights and `scale_rewards` act no more.

Shapes: N rollouts in contiguous groups of `group_size`; float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Any, cast

import torch

from hf_rb.advantages.pipeline import Requires, SequenceShaper, Shaped, ShapingContext
from hf_rb.methods import Metric, Paper, ShaperMethod, flag


__all__ = ["PassAtKFlags", "PassAtKShaper", "pass_at_k"]


@dataclass
class PassAtKFlags:
    """Flags of the shaper `pass_at_k`."""

    pass_at_k_k: int = flag(
        4,
        "Completions of which one must be correct; fewer than `num_generations`. The default is ours.",
        range="[1, inf)",
    )


def _rules(config: Any) -> Iterator[str]:
    if config.correct_reward is None:
        yield (
            "`advantage_shapers: [pass_at_k]` needs to know which completions are correct. Set `correct_reward` to "
            "the name of a reward function, such as `correct_reward: exact_answer_reward`."
        )
    for name in ("num_generations", "num_generations_eval"):
        number = getattr(config, name, None)
        if number is not None and 1 < number <= config.pass_at_k_k:
            yield (
                f"`pass_at_k_k: {config.pass_at_k_k}` must be below `{name}: {number}`: with as many, a group has one "
                "subset, and its completions no advantage."
            )


def pass_at_k(
    correct: torch.Tensor, wrong: torch.Tensor, group_size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages of every completion.

    Args:
        correct, wrong (`torch.Tensor` of shape `(N,)` and type `bool`):
            Which completions are correct and which are wrong. One that is neither counts nowhere and gets 0.
        group_size (`int`):
            Completions of a prompt; a divisor of N.
        k (`int`):
            Completions of which one must be correct, at least 1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Advantages `(N,)`, and R̄ of every group.

    Raises:
        ValueError: `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    advantages, rewards = torch.zeros(len(correct)), []
    for start in range(0, len(correct), group_size):
        group = slice(start, start + group_size)
        n, total = int(wrong[group].sum()), int((correct | wrong)[group].sum())
        if total < k:
            rewards.append(float(correct[group].any()))
            continue
        reward = 1 - comb(n, k) / comb(total, k)
        rewards.append(reward)
        sigma = (reward * (1 - reward)) ** 0.5
        if sigma > 0:
            negative = (1 - reward - comb(n - 1, k - 1) / comb(total - 1, k - 1)) / sigma
            positive = (1 - reward) / sigma
            advantages[group] = correct[group] * positive + wrong[group] * negative
    return advantages, torch.tensor(rewards)


class PassAtKShaper(SequenceShaper):
    """
    Pass@k advantages in the pipeline. They take the place of GRPO's, whatever the rewards were.

    Args:
        k (`int`, *optional*, defaults to `4`):
            As in [`pass_at_k`].
    """

    method = ShaperMethod(
        key="pass_at_k",
        name="Pass@k Training",
        paper=Paper(
            "2508.10751",
            "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models",
            "Zhipeng Chen, Xiaobo Qin, Youbin Wu, Yue Ling, Qinghao Ye, Wayne Xin Zhao, Guang Shi",
        ),
        summary="GRPO with advantages for one correct completion among k, so that hard prompts weigh more.",
        flags=PassAtKFlags,
        replaces=True,
        rules=_rules,
        metrics=(
            Metric("reward", "mean probability that one of k completions of a group is correct", "[0, 1]", "higher"),
            Metric("groups_silent", "share of groups that carry no signal", "[0, 1]", "lower"),
        ),
    )
    requires = Requires(correct=True)

    def __init__(self, k: int = PassAtKFlags.pass_at_k_k):
        self.k = k

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "PassAtKShaper":
        return cls(args.pass_at_k_k)

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped:
        correct, wrong = (cast(torch.Tensor, one) & ctx.valid for one in (ctx.correct, ctx.wrong))
        shaped, rewards = pass_at_k(correct, wrong, ctx.group_size, self.k)
        silent = (shaped.view(-1, ctx.group_size) == 0).all(1)
        metrics = {"reward": float(rewards.mean()), "groups_silent": float(silent.float().mean())}
        return Shaped(shaped.to(advantages), metrics)
