"""CalibAdv: calibrated advantages for search agents (https://huggingface.co/papers/2604.18235).

A rollout alternates between tokens that the model wrote and tool results. Its m runs of model tokens are m - 1 search
steps and, last, the answer. With A_i the advantage of rollout i, q_it in [0, 1] the quality of its search step t and
L_i the number of tokens of its answer, in every group

    step t        A_i (1 - q_it) if A_i < 0, else A_i
    answer        A_i            if A_i < 0, else A_i ρ N / P,    P = Σ_{A_i > 0} L_i A_i,  N = Σ_{A_i < 0} L_i |A_i|

so that a useful search is not punished for a wrong answer, and over the answers of a group the positive tokens weigh ρ
times the negative ones (ρ is `pos_neg_ratio`). If P or N is 0, the group's answers get 0: with advantages that sum to
0 in the group, only where one side has no answer. The first line breaks that sum on purpose. P and N count tokens: the
balance is that of losses that average over tokens, as `dapo` does. For a loss that averages over the tokens of each
rollout first, as `grpo` does, a token weighs one over the number of its rollout's tokens, in P and in N.

Without a judge, q_it comes from documents. The silver documents of a group are those that its best rollouts retrieved,
if they are good enough; q_it is the fraction of step t's documents that are silver and new to the rollout, or 0 if the
step repeats an earlier one's thought or documents.

Shapes: N rollouts in contiguous groups of `group_size`; advantages `(N,)`, runs and quality lists of N lists.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from hf_rb.advantages.pipeline import Requires, Shaped, ShapingContext, TokenShaper
from hf_rb.methods import Metric, Paper, ShaperMethod, flag


__all__ = [
    "SEQUENCE_MEAN_LOSSES",
    "CalibAdvFlags",
    "CalibAdvShaper",
    "calibadv",
    "ends_with_tool_call",
    "model_runs",
]

SEQUENCE_MEAN_LOSSES = ("grpo", "sapo")
"""TRL's losses that average over the tokens of each completion first."""


def calibadv(
    advantages: torch.Tensor | Sequence[float],
    runs: Sequence[Sequence[int]],
    quality: Sequence[Sequence[float]],
    group_size: int,
    pos_neg_ratio: float | None = 1.0,
    max_gain: float | None = None,
    weights: Sequence[float] | None = None,
) -> list[list[float]]:
    """
    Calibrates the advantages of every run of model tokens. Paper: https://huggingface.co/papers/2604.18235

    Args:
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages. The runs of a NaN stay NaN, and it counts nowhere.
        runs (`Sequence[Sequence[int]]` of length N):
            Tokens in each of a rollout's runs, the last one the answer: 0 if it has none. A rollout without tokens is
            empty.
        quality (`Sequence[Sequence[float]]` of length N):
            Quality in `[0, 1]` of each run before the last.
        group_size (`int`):
            Rollouts of one prompt; a divisor of N.
        pos_neg_ratio (`float`, *optional*, defaults to `1.0`):
            ρ, above 0. None leaves the answers as they are.
        max_gain (`float`, *optional*):
            Bound of ρ N / P, at least 1. One short right answer against long wrong ones gains without bound otherwise.
            Not in the paper.
        weights (`Sequence[float]` of length N, *optional*):
            What a token of each rollout weighs in P and N. Defaults to 1.

    Returns:
        `list[list[float]]`: Advantage of each run.

    Raises:
        ValueError: A parameter outside its range, or lengths that do not fit.
    """
    advantages = torch.as_tensor(advantages, dtype=torch.float64).tolist()
    _check_parameters(pos_neg_ratio, max_gain)
    _check_lengths(advantages, runs, quality, group_size)
    masses = _answer_masses(runs, weights)
    calibrated = []
    for start in range(0, len(advantages), group_size):
        group = slice(start, start + group_size)
        gain = _gain(advantages[group], masses[group], pos_neg_ratio, max_gain)
        for advantage, run, q in zip(advantages[group], runs[group], quality[group], strict=True):
            steps = [advantage * (1 - q_t) if advantage < 0 else advantage for q_t in q]
            answer = advantage * (gain if advantage > 0 or gain == 0 else 1)
            calibrated.append([*steps, answer] if run else [])
    return calibrated


def _answer_masses(runs: Sequence[Sequence[int]], weights: Sequence[float] | None) -> list[float]:
    """What the tokens of each rollout's answer weigh together."""
    weights = [1] * len(runs) if weights is None else weights
    return [weight * run[-1] if run else 0 for run, weight in zip(runs, weights, strict=True)]


def _gain(
    advantages: Sequence[float], masses: Sequence[float], pos_neg_ratio: float | None, max_gain: float | None
) -> float:
    """Factor on the group's positive answers; 0 stands for all of its answers."""
    if pos_neg_ratio is None:
        return 1.0
    pairs = list(zip(advantages, masses, strict=True))
    positive = sum(mass * advantage for advantage, mass in pairs if advantage > 0)
    negative = sum(mass * -advantage for advantage, mass in pairs if advantage < 0)
    if positive == 0 or negative == 0:
        return 0.0
    gain = pos_neg_ratio * negative / positive
    return gain if max_gain is None else min(gain, max_gain)


def _check_parameters(pos_neg_ratio: float | None, max_gain: float | None) -> None:
    if pos_neg_ratio is not None and not 0 < pos_neg_ratio < math.inf:
        raise ValueError(f"`pos_neg_ratio` is a number above 0, or None to leave answers alone; got {pos_neg_ratio}.")
    if max_gain is not None and not max_gain >= 1:
        raise ValueError(f"`max_gain` is a number of at least 1, or None for no bound; got {max_gain}.")


def _check_lengths(
    advantages: Sequence, runs: Sequence[Sequence], quality: Sequence[Sequence[float]], group_size: int
) -> None:
    if not len(advantages) == len(runs) == len(quality) or group_size < 1 or len(advantages) % group_size:
        raise ValueError(
            f"CalibAdv needs one entry a rollout, in whole groups; got {len(advantages)} advantages, {len(runs)} of "
            f"`runs`, {len(quality)} of `quality` and {group_size=}."
        )
    for i, (run, q) in enumerate(zip(runs, quality, strict=True)):
        if len(q) != max(len(run) - 1, 0):
            raise ValueError(
                f"`quality` has one entry for each run but the last; rollout {i} has {len(run)} runs and {len(q)} "
                "entries."
            )
        if not all(0 <= q_t <= 1 for q_t in q):
            raise ValueError(f"`quality` is between 0 and 1; rollout {i} has {list(q)}.")


def model_runs(mask: torch.Tensor) -> list[list[tuple[int, int]]]:
    """
    Finds the runs of model tokens.

    Args:
        mask (`torch.Tensor` of shape `(B, T)` and type `bool`):
            Tokens that the model wrote, padding excluded. TRL's `tool_mask` alone is 1 on padding.

    Returns:
        `list[list[tuple[int, int]]]`: for each row, first column and column after the last of each run.
    """
    edges = torch.nn.functional.pad(mask.cpu().to(torch.int8), (1, 1)).diff(dim=1)
    runs: list[list[tuple[int, int]]] = [[] for _ in range(len(mask))]
    for (row, start), (_, stop) in zip((edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist(), strict=True):
        runs[row].append((start, stop))
    return runs


def ends_with_tool_call(completion: str | list[dict], runs: int) -> bool:
    """
    Returns whether the last message calls a tool or is a tool's result: such a rollout never came to an answer.

    Args:
        completion (`str` or `list[dict]`):
            Messages.
        runs (`int`):
            Runs of model tokens. Where they are not as many as the assistant's messages, the last message is not the
            last run: TRL parses all that a `rollout_func` returned as one message, with the calls of every turn. No
            such completion ends with a call.
    """
    if isinstance(completion, str) or sum(message["role"] == "assistant" for message in completion) != runs:
        return False
    return bool(completion) and (completion[-1]["role"] == "tool" or bool(completion[-1].get("tool_calls")))


@dataclass
class CalibAdvFlags:
    """Flags of the shaper `calibadv`."""

    calibadv_soft: bool = flag(
        True, "Whether search steps that found good documents are penalised less for a wrong answer."
    )
    calibadv_pos_neg_ratio: float | None = flag(
        1.0,
        "Positive over negative advantage of the answers of a group, summed over tokens, after rebalancing; null "
        "does not rebalance.",
        range="(0, inf)",
    )
    calibadv_max_gain: float | None = flag(
        None,
        "Largest factor by which rebalancing multiplies an advantage. Not in the paper, where it is unbounded.",
        range="[1, inf)",
    )
    calibadv_weighting: str = flag(
        "token",
        "Weight of a token where the answers of a group are balanced: each the same (`token`, the authors' code),"
        " or as much as in the loss (`loss`). The two differ with `loss_type: grpo` and `sapo`, which average "
        "over the tokens of each completion first.",
        choices=["token", "loss"],
    )
    calibadv_qualify: float = flag(0.7, "Reward from which on the documents of a completion count as good.")
    calibadv_answer_must_not_call_tool: bool = flag(
        True,
        "Whether a last turn that calls a tool is a search step, and such a completion has no answer; `False` is "
        "the authors' code.",
    )
    calibadv_step_field: str | None = flag(
        None,
        "Field of the rollouts that holds the quality of each search step, as a `rollout_func` returns it. By "
        "default quality comes from silver documents.",
    )


def _rules(config: Any) -> Iterator[str]:
    """Fields of CalibAdv that another of its fields has switched off."""
    if not config.calibadv_soft and config.calibadv_pos_neg_ratio is None:
        yield (
            "`calibadv_soft: false` and `calibadv_pos_neg_ratio: null` leave CalibAdv nothing to do. Remove one of "
            "them, or `calibadv`."
        )
    without = {
        "calibadv_pos_neg_ratio: null": (
            config.calibadv_pos_neg_ratio is None,
            {"calibadv_max_gain": None, "calibadv_weighting": "token"},
        ),
        "calibadv_soft: false": (not config.calibadv_soft, {"calibadv_qualify": 0.7, "calibadv_step_field": None}),
        "calibadv_step_field": (config.calibadv_step_field is not None, {"calibadv_qualify": 0.7}),
    }
    for reason, (switched_off, fields) in without.items():
        for name, default in fields.items():
            if switched_off and getattr(config, name) != default:
                yield f"`{name}: {getattr(config, name)}` has no effect with `{reason}`. Remove one of the two."
    if config.calibadv_pos_neg_ratio is not None and config.multi_objective_aggregation == "normalize_then_sum":
        yield (
            "`multi_objective_aggregation: normalize_then_sum` centres advantages over the batch, and CalibAdv "
            "balances positive with negative ones in each group, which may have one kind only. Set "
            "`multi_objective_aggregation: sum_then_normalize`, or `calibadv_pos_neg_ratio: null`."
        )


def _recipe_rules(config: Any) -> Iterator[str]:
    if config.calibadv_soft and not (config.environment or config.calibadv_step_field):
        yield (
            "`advantage_shapers: [calibadv]` reads what tools return, and there are none: write `environment: "
            "search`, or `calibadv_soft: false` to balance answers only."
        )


def _warnings(config: Any) -> Iterator[str]:
    is_balanced = config.calibadv_pos_neg_ratio is not None and config.calibadv_weighting == "token"
    if is_balanced and config.loss_type in ("grpo", "sapo"):
        yield (
            f"`loss_type: {config.loss_type}` averages over the tokens of each completion first, and CalibAdv "
            "balances answers token by token, as in its paper's loss. `calibadv_weighting: loss` balances what this "
            "loss adds up."
        )


class CalibAdvShaper(TokenShaper):
    """
    CalibAdv in the pipeline.

    Args:
        step_scorer (`Callable[[ShapingContext], list[list[float]]]`, *optional*):
            Quality of the search steps of this process's rollouts, in order, zeros for an invalid format. Missing
            entries are 0 and surplus ones are not read. Every process calls it. Needed with `soft`. What it needs of a
            run, it says in an attribute `requires`, as a shaper does.
        soft (`bool`, *optional*, defaults to `True`):
            Whether useful searches of wrong rollouts are punished less.
        pos_neg_ratio (`float`, *optional*, defaults to `1.0`), max_gain (`float`, *optional*):
            As in [`calibadv`].
        answer_must_not_call_tool (`bool`, *optional*, defaults to `True`):
            Whether a last run that calls a tool is a search step. If false, the last run is the answer whatever it
            holds, as in the authors' code.
        sequence_mean (`bool`, *optional*, defaults to `False`):
            Whether answers are balanced for a loss that averages over the tokens of each rollout first, in place of
            over all tokens, as in the authors' code.
    """

    method = ShaperMethod(
        key="calibadv",
        name="CalibAdv",
        paper=Paper(
            "2604.18235",
            "Negative Advantages Is a Double-Edged Sword: Calibrating advantages in GRPO for Search Agents",
            "Jiayi Wu, Ruobing Xie, Zeqian Huang, Lei Jiang, Can Xu, Kangyang Luo, Bochen Lin, Ming Gao, Xiang Li",
        ),
        summary="GRPO for search agents that spares the searches of a wrong rollout which found what the best "
        "rollouts found, and balances the right and the wrong answers of a group.",
        level="token",
        flags=CalibAdvFlags,
        rules=_rules,
        recipe_rules=_recipe_rules,
        warnings=_warnings,
        metrics=(
            Metric("steps_per_rollout", "mean number of search steps of a rollout", "[0, inf)"),
            Metric("step_quality", "mean quality of a search step", "[0, 1]", "higher"),
            Metric("steps_relieved", "share of search steps that are punished less", "[0, 1]"),
            Metric("gain", "mean factor of rebalancing", "(0, inf)"),
            Metric("gain_max", "largest factor of rebalancing", "(0, inf)"),
            Metric("groups_one_sided", "groups without a negative answer to balance", "[0, inf)"),
        ),
    )

    def __init__(
        self,
        step_scorer: Callable[[ShapingContext], list[list[float]]] | None = None,
        soft: bool = True,
        pos_neg_ratio: float | None = 1.0,
        max_gain: float | None = None,
        answer_must_not_call_tool: bool = True,
        sequence_mean: bool = False,
    ):
        if soft and step_scorer is None:
            raise ValueError(
                "CalibAdv needs a `step_scorer` that says how useful each search step was. Give one, or set "
                "`calibadv_soft: false` to rebalance the answers only."
            )
        _check_parameters(pos_neg_ratio, max_gain)
        self.step_scorer, self.soft = step_scorer, soft
        self.pos_neg_ratio, self.max_gain = pos_neg_ratio, max_gain
        self.answer_must_not_call_tool, self.sequence_mean = answer_must_not_call_tool, sequence_mean
        self.requires = getattr(step_scorer, "requires", Requires()) if soft else Requires()

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "CalibAdvShaper":
        return cls(
            step_scorer=trainer.step_scorer,
            soft=args.calibadv_soft,
            pos_neg_ratio=args.calibadv_pos_neg_ratio,
            max_gain=args.calibadv_max_gain,
            answer_must_not_call_tool=args.calibadv_answer_must_not_call_tool,
            sequence_mean=args.calibadv_weighting == "loss" and args.loss_type in SEQUENCE_MEAN_LOSSES,
        )

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped:
        spans = model_runs(ctx.mask)
        tokens = [[stop - start for start, stop in row] for row in spans]
        if self.answer_must_not_call_tool:
            for row, completion in zip(tokens, ctx.completions, strict=True):
                if row and ends_with_tool_call(completion, len(row)):
                    row.append(0)
        scorer = self.step_scorer if self.soft else None
        scores = scorer(ctx) if scorer is not None else [[]] * len(tokens)
        quality = [([*q, *[0.0] * len(row)])[: max(len(row) - 1, 0)] for row, q in zip(tokens, scores, strict=True)]
        all_tokens, all_quality = zip(*ctx.gather(list(zip(tokens, quality, strict=True))), strict=True)

        scored = torch.where(ctx.valid, cast(torch.Tensor, ctx.sequence_advantages), torch.nan)
        weights = [1 / max(sum(row), 1) for row in all_tokens] if self.sequence_mean else None
        calibrated = calibadv(
            scored, all_tokens, all_quality, ctx.group_size, self.pos_neg_ratio, self.max_gain, weights
        )
        # A factor, so that whatever another token shaper made of the advantages is kept.
        factors = torch.ones(ctx.mask.shape)
        for i, (base, values) in enumerate(zip(scored[ctx.local].tolist(), calibrated[ctx.local], strict=True)):
            if base and not math.isnan(base):
                for (start, stop), value in zip(spans[i], values, strict=False):
                    factors[i, start:stop] = value / base
        return Shaped(
            advantages * factors.to(advantages),
            self._metrics(scored.tolist(), _answer_masses(all_tokens, weights), all_quality, ctx.group_size),
            {"step_quality": [" ".join(f"{q_t:.2f}" for q_t in q) for q in quality]},
        )

    def _metrics(
        self,
        advantages: list[float],
        masses: Sequence[float],
        quality: Sequence[Sequence[float]],
        group_size: int,
    ) -> dict[str, float]:
        groups = [slice(start, start + group_size) for start in range(0, len(advantages), group_size)]
        groups = [g for g in groups if any(a > 0 for a in advantages[g])]  # the others have nothing to balance
        gains = [_gain(advantages[g], masses[g], self.pos_neg_ratio, self.max_gain) for g in groups]
        one_sided = gains.count(0)
        gains = [gain for gain in gains if gain] or [1.0]
        steps = [q_t for q in quality for q_t in q]
        relieved = [q_t > 0 and a < 0 for a, q in zip(advantages, quality, strict=True) for q_t in q]
        return {
            "steps_per_rollout": len(steps) / len(advantages),
            "step_quality": sum(steps) / max(len(steps), 1),
            "steps_relieved": sum(relieved) / max(len(steps), 1),
            "gain": sum(gains) / len(gains),
            "gain_max": max(gains),
            "groups_one_sided": one_sided,
        }
