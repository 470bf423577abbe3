"""EDAS: error-diversity advantage shaping (https://huggingface.co/papers/2605.17333).

In a group of G rollouts let W be the wrong ones, N_w of them, split into K classes by their final answer; class k
holds n_k, p_k = n_k / N_w. Rollouts outside W keep their advantage; where there is a format score, the authors' code
leaves wrong rollouts with less than 0.5 of it outside too. For i in W, with natural logarithms,

    S   = 1/N_w Σ_{j ∈ W} |A_j|
    Δ_i = 0                                             N_w ≤ 1
        = -β S                                          K = 1: the group has collapsed onto one error
        = α S (-ln p_k(i) - H) / ln N_w                 K > 1, H = -Σ_k p_k ln p_k
    A'_i = A_i + sgn(Δ_i) min(|Δ_i|, |A_i| / κ)

A common error is pushed down harder, a rare one less hard, and no advantage changes its sign. The third line sums to 0
over W, so before the clip the mean of the group stays. Where all classes are equally frequent, nothing changes.

Shapes: N rollouts in contiguous groups of `group_size`; advantages and correct `(N,)`, answers a list of N.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hf_rb.advantages.pipeline import Requires, SequenceShaper, Shaped, ShapingContext
from hf_rb.methods import Metric, Paper, ShaperMethod, flag


__all__ = ["NO_ANSWER", "EdasFlags", "EdasShaper", "edas", "edas_warmup", "error_classes"]

NO_ANSWER = ("cluster", "skip", "singleton")

Equivalence = Callable[[str, str], bool]


def edas(
    advantages: torch.Tensor,
    group_size: int,
    correct: torch.Tensor | Sequence[bool],
    answers: Sequence[str | None],
    alpha: float = 0.4,
    beta: float = 0.3,
    kappa: float = 2.0,
    no_answer: str = "cluster",
    equivalent: Equivalence | None = None,
) -> torch.Tensor:
    """
    Shapes the advantages of wrong rollouts by how common their error is in the group. Paper:
    https://huggingface.co/papers/2605.17333

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages. A NaN comes back unchanged and counts nowhere.
        group_size (`int`):
            Rollouts of one prompt; a divisor of N.
        correct (`torch.Tensor` of shape `(N,)` and type `bool`):
            Which rollouts are correct.
        answers (`Sequence[str | None]` of length N):
            Final answers; None or blank is no answer. Compared stripped and in lower case, then by `equivalent`.
        alpha (`float`, *optional*, defaults to `0.4`):
            Strength α on groups with several errors, at least 0; the paper uses 0.4, its code defaults to 0.2.
        beta (`float`, *optional*, defaults to `0.3`):
            Strength β on groups with one error, at least 0; the paper uses 0.3 with DAPO and 0.2 with GRPO.
        kappa (`float`, *optional*, defaults to `2.0`):
            An advantage moves by at most the κ-th part of itself; above 1.
        no_answer (`str`, *optional*, defaults to `"cluster"`):
            Wrong rollouts without an answer are one error (`"cluster"`, the authors' code), left as they are
            (`"skip"`), or an error each (`"singleton"`).
        equivalent (`Callable[[str, str], bool]`, *optional*):
            Whether two different answers mean the same. Called at most once for an answer and a class.

    Returns:
        `torch.Tensor` of shape `(N,)`: Shaped advantages.

    Raises:
        ValueError: A parameter outside its range, or lengths that do not fit.
    """
    if alpha < 0 or beta < 0 or kappa <= 1:
        raise ValueError(f"EDAS needs alpha >= 0, beta >= 0 and kappa > 1; got {alpha=}, {beta=}, {kappa=}.")
    classes, _ = _wrong_classes(advantages, group_size, correct, answers, no_answer, equivalent)
    return _shape(advantages, classes, group_size, alpha, beta, kappa)[0]


def edas_warmup(step: int, start: int = 0, steps: int = 0) -> float:
    """Factor on α and β: 0 before `start`, then linear up to 1 over `steps` optimizer steps, or at once if `steps` is
    0.
    """
    if step < start:
        return 0.0
    return 1.0 if steps == 0 else min(1.0, (step - start) / steps)


def error_classes(
    answers: Sequence[str | None],
    wrong: Sequence[bool],
    group_size: int,
    no_answer: str = "cluster",
    equivalent: Equivalence | None = None,
) -> tuple[list[int], list[str]]:
    """
    Splits the wrong rollouts of every group by their final answer.

    Args:
        answers (`Sequence[str | None]` of length N):
            Final answers.
        wrong (`Sequence[bool]` of length N):
            Which rollouts to split.
        group_size (`int`):
            Rollouts of one prompt.
        no_answer (`str`, *optional*, defaults to `"cluster"`):
            As in [`edas`].
        equivalent (`Callable[[str, str], bool]`, *optional*):
            As in [`edas`]. Answers are compared in alphabetical order, each with the first of every class so far, so
            that the classes do not depend on the order of the rollouts even if `equivalent` is not transitive.

    Returns:
        `tuple[list[int], list[str]]`: for each rollout the number of its class, or -1 if it has none; for each class
        an answer that stands for it. No two groups share a class.
    """
    classes, names = [-1] * len(answers), []
    for start in range(0, len(answers), group_size):
        rollouts: dict[str, list[int]] = {}
        for i in range(start, start + group_size):
            if wrong[i]:
                rollouts.setdefault("" if answers[i] is None else str(answers[i]).strip().lower(), []).append(i)
        for name, members in _partition(rollouts, no_answer, equivalent):
            for i in members:
                classes[i] = len(names)
            names.append(name)
    return classes, names


def _partition(rollouts: dict[str, list[int]], no_answer: str, equivalent: Equivalence | None) -> list[tuple]:
    blank = rollouts.pop("", [])
    found: dict[str, list[int]] = {}
    for answer in sorted(rollouts):
        name = next((name for name in found if equivalent is not None and equivalent(name, answer)), answer)
        found.setdefault(name, []).extend(rollouts[answer])
    silent = {"cluster": [blank] if blank else [], "skip": [], "singleton": [[i] for i in blank]}[no_answer]
    return [*found.items(), *(("", members) for members in silent)]


def _wrong_classes(
    advantages: torch.Tensor,
    group_size: int,
    correct: torch.Tensor | Sequence[bool],
    answers: Sequence[str | None],
    no_answer: str,
    equivalent: Equivalence | None,
) -> tuple[torch.Tensor, list[str]]:
    correct = torch.as_tensor(correct, dtype=torch.bool, device=advantages.device)
    n = advantages.numel()
    if advantages.shape != (n,) or correct.shape != (n,) or len(answers) != n or group_size < 1 or n % group_size:
        raise ValueError(
            f"EDAS needs one entry a rollout, in whole groups; got advantages of shape {tuple(advantages.shape)}, "
            f"`correct` of shape {tuple(correct.shape)}, {len(answers)} answers and group_size={group_size}."
        )
    if no_answer not in NO_ANSWER:
        raise ValueError(f"`no_answer={no_answer!r}` is unknown. Choose one of {', '.join(map(repr, NO_ANSWER))}.")
    wrong = (~correct & ~advantages.isnan()).tolist()
    classes, names = error_classes(answers, wrong, group_size, no_answer, equivalent)
    return torch.tensor(classes, dtype=torch.long, device=advantages.device), names


def _shape(
    advantages: torch.Tensor, classes: torch.Tensor, group_size: int, alpha: float, beta: float, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the shaped advantages and where the clip acted; `classes` is -1 outside W."""
    # In float64 the offsets of equally frequent classes vanish in the rounding of the result.
    base, wrong = advantages.double(), classes >= 0
    count = wrong.view(-1, group_size).sum(1, keepdim=True)

    def mean(values: torch.Tensor) -> torch.Tensor:
        total = torch.where(wrong, values, 0).view(-1, group_size).sum(1, keepdim=True)
        return (total / count.clamp(min=1)).expand(-1, group_size).flatten()

    in_group = count.double().expand(-1, group_size).flatten()
    in_class = torch.bincount(classes[wrong], minlength=1)[classes.clamp(min=0)]
    information = -(in_class / in_group.clamp(min=1)).log()
    diverse = alpha * (information - mean(information)) / in_group.clamp(min=2).log()
    delta = mean(base.abs()) * torch.where(in_class == in_group, -beta, diverse)
    delta = torch.where(wrong & (in_group > 1), delta, 0)

    bound = base.abs() / kappa
    shaped = base + delta.sign() * torch.minimum(delta.abs(), bound)
    return torch.where(wrong, shaped.to(advantages.dtype), advantages), wrong & (delta.abs() > bound)


@dataclass
class EdasFlags:
    """Flags of the shaper `edas`."""

    edas_alpha: float = flag(0.4, "Strength of EDAS on groups with several different errors.", range="[0, inf)")
    edas_beta: float = flag(
        0.3,
        "Strength of EDAS on groups whose wrong answers are all the same. The paper: 0.3 with DAPO, 0.2 with GRPO.",
        range="[0, inf)",
    )
    edas_kappa: float = flag(2.0, "EDAS moves an advantage by at most this part of itself, 1/kappa.", range="(1, inf)")
    edas_no_answer: str = flag(
        "cluster",
        "Wrong completions without an answer are one error (`cluster`, the authors' code), left alone (`skip`), or"
        " an error each (`singleton`).",
        choices=["cluster", "skip", "singleton"],
    )
    edas_equivalence: str = flag(
        "auto",
        "When two answers are the same: as rewards and evaluation compare them "
        "([`~hf_rb.rl.answers.same_answer`]), with `math-verify` where it is installed (`auto`) or not without it "
        "(`math`; needs `pip install 'hf_rb[math]'`); or where their texts are, up to case and surrounding blanks "
        "(`string`).",
        choices=["auto", "math", "string"],
    )
    edas_warmup_start: int = flag(0, "Optimizer step at which EDAS starts.", range="[0, inf)")
    edas_warmup_steps: int = flag(0, "Steps over which the strengths of EDAS grow to their values.", range="[0, inf)")
    edas_format_reward: str | None = flag(
        None,
        "Reward function that scores the format. EDAS leaves wrong completions alone to which it gives less than "
        "0.5, as the authors' code does.",
    )


def _rules(config: Any) -> Iterator[str]:
    if config.correct_reward is None:
        yield (
            "`advantage_shapers: [edas]` needs to know which completions are wrong. Set `correct_reward` to the name "
            "of a reward function, such as `correct_reward: exact_answer_reward`."
        )


def _warnings(config: Any) -> Iterator[str]:
    if config.mask_truncated_completions and config.edas_no_answer == "cluster":
        yield (
            "`mask_truncated_completions` takes truncated completions out of the loss, and to EDAS they remain one "
            "error, that of no answer. `edas_no_answer: skip` leaves them out there too."
        )


class EdasShaper(SequenceShaper):
    """
    EDAS in the pipeline. Reads `ShapingContext.wrong` and `ShapingContext.answers`.

    Args:
        alpha (`float`, *optional*, defaults to `0.4`), beta (`float`, *optional*, defaults to `0.3`),
        kappa (`float`, *optional*, defaults to `2.0`), no_answer (`str`, *optional*, defaults to `"cluster"`),
        equivalent (`Callable[[str, str], bool]`, *optional*):
            As in [`edas`].
        warmup_start (`int`, *optional*, defaults to `0`), warmup_steps (`int`, *optional*, defaults to `0`):
            As in [`edas_warmup`].
        format_reward (`str`, *optional*):
            Name of a reward function. Wrong rollouts to which it gives less than 0.5 are left as they are.
    """

    method = ShaperMethod(
        key="edas",
        name="EDAS",
        paper=Paper(
            "2605.17333",
            "Leveraging Error Diversity in Group Rollouts for Reinforcement Learning",
            "Wenpu Liu, Yuqi Xu, Weichu Xie, Yongfu Zhu, Shuai Dong, Ziyue Wang, Wenqi Shao, Xiaoying Zhang, Tong"
            " Yang, Nan Duan, Jiaqi Wang",
        ),
        summary="GRPO that, among the wrong completions of a prompt, punishes the error which most of them share "
        "harder and rare errors less.",
        flags=EdasFlags,
        rules=_rules,
        warnings=_warnings,
        metrics=(
            Metric("groups_diverse", "groups with several different errors", "[0, inf)"),
            Metric("groups_collapsed", "groups whose wrong answers are all the same", "[0, inf)", "lower"),
            Metric("groups_skipped", "groups with at most one wrong answer, which EDAS leaves alone", "[0, inf)"),
            Metric("wrong_per_group", "mean number of wrong answers in a group", "[0, inf)", "lower"),
            Metric("classes_per_group", "mean number of different errors in a group", "[0, inf)"),
            Metric("clipped", "share of wrong answers whose change met the bound of `edas_kappa`", "[0, 1]"),
            Metric("warmup", "factor of the strengths", "[0, 1]"),
        ),
    )

    def __init__(
        self,
        alpha: float = 0.4,
        beta: float = 0.3,
        kappa: float = 2.0,
        no_answer: str = "cluster",
        equivalent: Equivalence | None = None,
        warmup_start: int = 0,
        warmup_steps: int = 0,
        format_reward: str | None = None,
    ):
        edas(torch.zeros(0), 1, [], [], alpha, beta, kappa, no_answer)  # refuses bad parameters before the first step
        self.alpha, self.beta, self.kappa = alpha, beta, kappa
        self.no_answer, self.equivalent = no_answer, equivalent
        self.warmup_start, self.warmup_steps = warmup_start, warmup_steps
        self.format_reward = format_reward
        self.requires = Requires(correct=True, answers=True, rewards=(format_reward,) if format_reward else ())

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "EdasShaper":
        return cls(
            alpha=args.edas_alpha,
            beta=args.edas_beta,
            kappa=args.edas_kappa,
            no_answer=args.edas_no_answer,
            equivalent=trainer.answers_equivalent,
            warmup_start=args.edas_warmup_start,
            warmup_steps=args.edas_warmup_steps,
            format_reward=args.edas_format_reward,
        )

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped:
        scored = torch.where(ctx.valid, advantages, torch.nan)
        group_size = ctx.group_size
        classes, names = self._classes(ctx)
        factor = edas_warmup(ctx.step, self.warmup_start, self.warmup_steps)
        shaped, clipped = _shape(scored, classes, group_size, factor * self.alpha, factor * self.beta, self.kappa)

        inside = classes >= 0
        wrong = inside.view(-1, group_size).sum(1)
        group = torch.arange(len(classes)) // group_size
        group_of_class = torch.zeros(len(names), dtype=torch.long).scatter_(0, classes[inside], group[inside])
        kinds = torch.bincount(group_of_class, minlength=len(wrong))
        metrics = {
            "groups_diverse": (kinds > 1).sum(),
            "groups_collapsed": ((kinds == 1) & (wrong > 1)).sum(),
            "groups_skipped": (wrong <= 1).sum(),
            "wrong_per_group": wrong.float().mean(),
            "classes_per_group": kinds.float().mean(),
            "clipped": clipped.sum() / wrong.sum().clamp(min=1),
            "warmup": factor,
        }
        error_class = [names[k] if k >= 0 else None for k in classes[ctx.local].tolist()]
        return Shaped(
            torch.where(ctx.valid, shaped, advantages),
            {key: float(value) for key, value in metrics.items()},
            {"error_class": error_class},
        )

    def _classes(self, ctx: ShapingContext) -> tuple[torch.Tensor, list[str]]:
        """[`error_classes`] of all rollouts."""
        wrong, answers = cast(torch.Tensor, ctx.wrong) & ctx.valid, cast(list, ctx.answers)  # `requires` asks for both
        if self.format_reward is not None:
            wrong &= ~(ctx.reward(self.format_reward) < 0.5)  # a NaN is no score, and no reason to leave one out
        wrong, group_size, starts, gather = wrong.tolist(), ctx.group_size, range(len(wrong)), list
        if self.equivalent is not None:
            # Mathematics takes time, and may run out of it on one process and not on another: each compares the
            # answers of the groups that begin on it, and tells the others.
            starts, gather = range(*ctx.local.indices(len(wrong))), ctx.gather
        found = [
            error_classes(
                answers[i : i + group_size], wrong[i : i + group_size], group_size, self.no_answer, self.equivalent
            )
            if i % group_size == 0
            else None
            for i in starts
        ]
        classes, names = [], []
        for of_group, representatives in filter(None, gather(found)):
            classes += [k + len(names) if k >= 0 else -1 for k in of_group]
            names += representatives
        return torch.tensor(classes, dtype=torch.long), names
