"""SRaR: step-wise rubrics as rewards (https://huggingface.co/papers/2605.17291).

A problem comes with a rubric: typed items, N_τ of type τ. A judge says of each item j whether a rollout satisfies it
and in which step k_j. With δ_j = R_τ / N_τ if item j is satisfied, else 0, rollout i has in step k the score

    d_ki = Σ_{j: k_j = k} δ_j                           R = 0.8 (SUGGEST), -1 (PITFALL: fallen into), 1 (BONUS)

and over the rollouts G_k of its group that have step k, every token of step k gets the offset

    z_ki = (d_ki - μ_k) / (σ_k + ε)                     0 if |G_k| ≤ 1 or σ_k ≤ ε

which is added to the outcome's advantage; the outcome's baseline never sees the rubric. G_k are the rollouts with an
item satisfied in step k ("code", the authors') or attributed to it, satisfied or not ("paper"). The paper's σ is that
of a population (`ddof=0`), the code's that of a sample (`ddof=1`). A judge's step of 0 is the whole completion, -1 is
no step. A step that does not exist keeps its number and is compared under it, and every token gets its offset
("code"); the paper does not say, and here it is step 0 ("paper").

Shapes: N rollouts in contiguous groups of `group_size`; per-step quantities are lists of N dicts `{step: value}`;
steps count from 1 and 0 is the whole completion.
"""

import inspect
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hf_rb.advantages.pipeline import Requires, Shaped, ShapingContext, TokenShaper
from hf_rb.advantages.rubrics import (
    WEIGHTS,
    JudgeFlags,
    JudgeRequest,
    RubricItem,
    judge_rules,
    parse_rubric,
    parse_verdicts,
)
from hf_rb.advantages.solution_steps import STEP_HEADER, find_steps, token_spans
from hf_rb.methods import Metric, Paper, ShaperMethod, flag


__all__ = [
    "SrarFlags",
    "SrarShaper",
    "srar_offsets",
    "srar_step_scores",
]

logger = logging.getLogger(__name__)


def srar_step_scores(
    verdicts: Sequence[Mapping],
    rubric: Sequence[str],
    num_steps: int,
    gk: str = "code",
    weights: Mapping[str, float] | None = None,
) -> dict[int, float]:
    """
    Adds up one rollout's verdicts by step.

    Args:
        verdicts (`Sequence[Mapping]`):
            `{"id": 1-based, "satisfied": bool, "step": int}`, at most one an item.
        rubric (`Sequence[str]`):
            Types of the items in line order.
        num_steps (`int`):
            Steps of the rollout.
        gk (`str`, *optional*, defaults to `"code"`):
            `"code"`: a step has a score if an item is satisfied in it, and one that the rollout does not have keeps
            its number. `"paper"`: a step has a score if an item is attributed to it, and one that the rollout does not
            have is step 0.
        weights (`Mapping[str, float]`, *optional*):
            R_τ by type, by default the paper's `WEIGHTS`.

    Returns:
        `dict[int, float]`: score of each step; 0, and with `"code"` every number outside 1 to `num_steps`, stands for
        the whole completion.

    Raises:
        ValueError: An unknown `gk`.
    """
    if gk not in ("code", "paper"):
        raise ValueError(f"`gk={gk!r}` is unknown. Choose 'code' or 'paper'.")
    weights, of_type, scores = WEIGHTS if weights is None else weights, Counter(rubric), defaultdict(float)
    for verdict in verdicts:
        kind, step = rubric[verdict["id"] - 1], verdict["step"]
        if kind in weights and step != -1 and (verdict["satisfied"] or gk == "paper"):
            exists = 1 <= step <= num_steps
            scores[step if exists or gk == "code" else 0] += verdict["satisfied"] * weights[kind] / of_type[kind]
    return dict(scores)


def srar_offsets(
    step_scores: Sequence[Mapping[int, float]], group_size: int, ddof: int = 1, eps: float = 1e-4
) -> list[dict[int, float]]:
    """
    Normalises every step's scores over the rollouts of the group that have it.

    Args:
        step_scores (`Sequence[Mapping[int, float]]` of length N):
            Score of each step; empty for a rollout that was not judged.
        group_size (`int`):
            Rollouts of one prompt; a divisor of N.
        ddof (`int`, *optional*, defaults to `1`):
            1 for the standard deviation of a sample (the authors' code), 0 for that of a population (the paper).
        eps (`float`, *optional*, defaults to `1e-4`):
            ε; the authors' code uses 1e-6, TRL's advantages 1e-4.

    Returns:
        `list[dict[int, float]]`: z of each step of each rollout.

    Raises:
        ValueError: Groups that are not whole, another `ddof`, or an `eps` below 0.
    """
    if not eps >= 0:
        raise ValueError(f"`eps` must be 0 or more; got {eps}. TRL's is 1e-4, the authors' 1e-6.")
    if ddof not in (0, 1):
        raise ValueError(f"`ddof` is 0 (population) or 1 (sample); got {ddof}.")
    if group_size < 1 or len(step_scores) % group_size:
        raise ValueError(f"SRaR needs whole groups; got {len(step_scores)} rollouts and {group_size=}.")
    offsets = []
    for start in range(0, len(step_scores), group_size):
        group = step_scores[start : start + group_size]
        spread = {step: _spread([d[step] for d in group if step in d], ddof) for step in set().union(*group)}
        offsets += [{step: _normalised(value, *spread[step], eps) for step, value in d.items()} for d in group]
    return offsets


def _spread(values: list[float], ddof: int) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - ddof)) if len(values) > 1 else 0.0


def _normalised(value: float, mean: float, std: float, eps: float) -> float:
    return 0.0 if std <= eps else (value - mean) / (std + eps)


@dataclass
class SrarFlags(JudgeFlags):
    """Flags of the shaper `srar`."""

    srar_coef: float = flag(1.0, "Weight of the step scores, which are added to the advantages.", range="[0, inf)")
    srar_gk: str = flag(
        "code",
        "Which completions the score of a step is compared with: those with a criterion that is met in it (`code`,"
        " the authors'), or with a criterion that the judge places in it, met or not (`paper`). Also what becomes "
        "of steps that do not exist, see [`~hf_rb.advantages.srar_step_scores`].",
        choices=["code", "paper"],
    )
    srar_ddof: int = flag(
        1, "1 divides step scores by the unbiased standard deviation, 0 by that of the population.", choices=[0, 1]
    )
    srar_eps: float = flag(
        1e-4,
        "Number added to the standard deviation that divides step scores. A step whose scores deviate no more "
        "than this has no offset. 1e-4 is TRL's for advantages; the authors' code uses 1e-6.",
        range="[0, inf)",
    )
    srar_only_mixed: bool = flag(True, "Whether only groups with correct and wrong completions are judged.")
    srar_step_pattern: str | None = flag(
        None, "Regular expression that matches where a step begins. Defaults to headers such as `### Step 1:`."
    )
    srar_judge: str | None = flag(
        None,
        "Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or `tiny`, "
        "an offline judge for `tiny:math`. The trainer's `judge` takes any callable.",
        secret=True,
    )
    srar_judge_model: str | None = flag(None, "Model that the endpoint of `srar_judge` serves.")


def _rules(config: Any) -> Iterator[str]:
    try:
        re.compile(config.srar_step_pattern or "")
    except re.error as error:
        yield f"`srar_step_pattern: {config.srar_step_pattern}` is not a regular expression: {error}."
    yield from judge_rules(config)


def _recipe_rules(config: Any) -> Iterator[str]:
    if config.srar_judge is None:
        yield (
            "`advantage_shapers: [srar]` needs a judge of steps: write `srar_judge: ...`, the URL of an endpoint or "
            "`tiny`."
        )
    if config.srar_only_mixed and config.correct_reward is None:
        yield (
            "`advantage_shapers: [srar]` judges groups with correct and wrong completions. Set `correct_reward`, or "
            "`srar_only_mixed: false`."
        )


class SrarShaper(TokenShaper):
    """
    SRaR in the pipeline. Reads a rubric from the dataset, as [`parse_rubric`] accepts it; an empty one adds nothing.

    Args:
        judge (`Callable[[list[JudgeRequest]], list[str | list | None]]`):
            Replies to the requests, in order, as [`parse_verdicts`] accepts them; None where there is none. Whatever
            it raises or returns, training goes on: such a rollout gets no offset, is in no G_k and is counted in
            `judge_failed`.
        coef (`float`, *optional*, defaults to `1.0`):
            Factor on the offsets.
        gk (`str`, *optional*, defaults to `"code"`):
            As in [`srar_step_scores`].
        ddof (`int`, *optional*, defaults to `1`):
            As in [`srar_offsets`].
        only_mixed (`bool`, *optional*, defaults to `True`):
            Whether only groups with correct and wrong rollouts are judged: what remains of the authors' batches after
            their filter, at a fraction of the calls.
        rubric_column (`str`, *optional*, defaults to `"rubric"`):
            The dataset's column.
        step_pattern (`str`, *optional*):
            Regular expression that matches where a step begins. Defaults to `### Step N:` headers.
        eps (`float`, *optional*, defaults to `1e-4`):
            As in [`srar_offsets`].
    """

    method = ShaperMethod(
        key="srar",
        name="SRaR",
        paper=Paper(
            "2605.17291",
            "Step-wise Rubric Rewards for LLM Reasoning",
            "Weichu Xie, Haozhe Zhao, Wenpu Liu, Yongfu Zhu, Liang Chen, Minghao Ye, Zirong Chen, Yuqi Xu, Shuai "
            "Dong, Ziyue Wang, Xinbo Xu, Kean Shi, Ruoyu Wu, Xiaoying Zhang, Wenqi Shao, Baobao Chang, Nan Duan, "
            "Jiaqi Wang",
        ),
        summary="GRPO with a judge that finds the items of a rubric in the steps of a solution; steps better than"
        " the same step of the other completions gain, worse ones lose.",
        level="token",
        additive=True,
        flags=SrarFlags,
        rules=_rules,
        recipe_rules=_recipe_rules,
        metrics=(
            Metric("judged", "rollouts that were judged", "[0, inf)"),
            Metric("judge_failed", "rollouts whose judge failed", "[0, inf)", "lower"),
            Metric("steps_per_rollout", "mean number of steps of a judged rollout", "[0, inf)"),
            Metric("satisfied", "share of the verdicts that an item is satisfied", "[0, 1]", "higher"),
            Metric("step_out_of_range", "share of the verdicts on steps that do not exist", "[0, 1]", "lower"),
        ),
    )

    def __init__(
        self,
        judge: Callable[[list[JudgeRequest]], list[str | list | None]],
        coef: float = 1.0,
        gk: str = "code",
        ddof: int = 1,
        only_mixed: bool = True,
        rubric_column: str = "rubric",
        step_pattern: str | None = None,
        eps: float = 1e-4,
    ):
        if judge is None:
            raise ValueError(
                "SRaR needs a `judge`. Set `srar_judge` to the URL of an endpoint, or pass a callable, "
                "`judge=Judge(ask)`."
            )
        if any(map(inspect.iscoroutinefunction, (judge, type(judge).__call__))):
            raise TypeError(
                "The `judge` of SRaR takes a list of requests and returns a list of replies, and is no coroutine "
                "function. Make one of `async def ask(request)`, which replies to one request: "
                "`judge=hf_rb.judges.Judge(ask)`."
            )
        srar_step_scores([], [], 0, gk)  # refuse bad parameters before the first step
        srar_offsets([], 1, ddof, eps)
        self.judge, self.coef, self.gk, self.ddof, self.eps = judge, coef, gk, ddof, eps
        self.only_mixed, self.rubric_column = only_mixed, rubric_column
        self.step_pattern = STEP_HEADER if step_pattern is None else re.compile(step_pattern)
        self.requires = Requires(columns=(rubric_column,), correct=only_mixed, answers=True)

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "SrarShaper":
        return cls(
            trainer.judge,
            coef=args.srar_coef,
            gk=args.srar_gk,
            ddof=args.srar_ddof,
            only_mixed=args.srar_only_mixed,
            step_pattern=args.srar_step_pattern,
            eps=args.srar_eps,
        )

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped:
        judged = self._judge(ctx)
        scores = [self._scores(judged[i]) if i in judged else {} for i in range(len(ctx.completion_ids))]
        counts = [judged[i].counts() if i in judged else None for i in range(len(scores))]
        gathered = ctx.gather(list(zip(scores, counts, strict=True)))
        offsets = srar_offsets([d for d, _ in gathered], ctx.group_size, self.ddof, self.eps)[ctx.local]

        added = torch.zeros(ctx.mask.shape)
        for i, rollout in judged.items():
            spans = token_spans(ctx.completion_ids[i], _decoder(ctx), rollout.steps) if offsets[i] else []
            for step, z in offsets[i].items():
                start, stop = spans[step - 1] if 1 <= step <= len(spans) else (0, None)
                added[i, start:stop] += z
        return Shaped(
            advantages + self.coef * added.to(advantages),
            _metrics([c for _, c in gathered if c is not None]),
            {"step_offsets": [" ".join(f"{step}:{z_k:+.2f}" for step, z_k in sorted(z.items())) for z in offsets]},
        )

    def _judge(self, ctx: ShapingContext) -> dict[int, "_Rollout"]:
        """Judges this process's rollouts that are worth it; by their place in the batch."""
        wanted = ctx.valid
        if self.only_mixed:
            correct, wrong = cast(torch.Tensor, ctx.correct), cast(torch.Tensor, ctx.wrong)  # `requires` asks for both
            right, wrong = ((ctx.valid & c).view(-1, ctx.group_size).any(1) for c in (correct, wrong))
            wanted = wanted & (right & wrong).repeat_interleave(ctx.group_size)
        answers = [None] * len(wanted) if ctx.answers is None else ctx.answers
        decode, rollouts, requests = _decoder(ctx), {}, []
        for i in wanted[ctx.local].nonzero().flatten().tolist():
            text, rubric = decode(ctx.completion_ids[i]), parse_rubric(ctx.rows[i][self.rubric_column] or "")
            if text.strip() and rubric:
                steps = find_steps(text, self.step_pattern)
                rollouts[i] = _Rollout(steps, rubric)
                requests.append(JudgeRequest(ctx.prompts[i], rubric, text, steps, answers[ctx.local][i]))
        for rollout, reply in zip(rollouts.values(), self._replies(requests), strict=True):
            try:
                rollout.verdicts = None if reply is None else parse_verdicts(reply, len(rollout.rubric))
            except ValueError as error:
                logger.warning("A judge's reply is counted as failed. %s", error)
        return rollouts

    def _replies(self, requests: list[JudgeRequest]) -> list[str | list | None]:
        try:
            replies = list(self.judge(requests)) if requests else []
            if len(replies) != len(requests):
                raise ValueError(f"it gave {len(replies)} replies to {len(requests)} requests")
            return replies
        except Exception as error:  # a judge is a service, or a user's code: it may fail, the run may not
            logger.warning("The judge failed: %s: %s", type(error).__name__, error)
            return [None] * len(requests)

    def _scores(self, rollout: "_Rollout") -> dict[int, float]:
        kinds = [item.type for item in rollout.rubric]
        return srar_step_scores(rollout.verdicts or [], kinds, len(rollout.steps), self.gk)


@dataclass
class _Rollout:
    steps: list[tuple[int, int]]
    rubric: list[RubricItem]
    verdicts: list[dict] | None = None

    def counts(self) -> tuple[int, int, int, int, int]:
        """Failed, steps, verdicts, satisfied, verdicts on steps that do not exist."""
        verdicts = self.verdicts or []
        nowhere = [not -1 <= verdict["step"] <= len(self.steps) for verdict in verdicts]
        satisfied = [verdict["satisfied"] for verdict in verdicts]
        return self.verdicts is None, len(self.steps), len(verdicts), sum(satisfied), sum(nowhere)


def _decoder(ctx: ShapingContext) -> Callable[[Sequence[int]], str]:
    return lambda ids: ctx.processing_class.decode(ids, skip_special_tokens=True)


def _metrics(counts: list[tuple[int, int, int, int, int]]) -> dict[str, float]:
    judged = len(counts)
    sums = [sum(column) for column in zip(*counts, strict=True)]
    failed, steps, verdicts, satisfied, nowhere = sums or [0] * 5
    return {
        "judged": judged,
        "judge_failed": failed,
        "steps_per_rollout": steps / max(judged, 1),
        "satisfied": satisfied / max(verdicts, 1),
        "step_out_of_range": nowhere / max(verdicts, 1),
    }
