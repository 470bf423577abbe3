"""Pipeline between GRPO's advantages and its loss: a list of shapers, run in order.

Three estimators of the literature change the advantages of GRPO after the fact and leave rewards, baseline and loss
alone. Each is a shaper. A *sequence* shaper maps one number a rollout to one number a rollout and sees all N rollouts
of the generation, whatever process they live on. A *token* shaper maps one number a token to one number a token on
this process's rollouts.

    base (N,) ─ sequence shapers, as listed ─ (N,) ─ own rows (B,)
      ├─ no token shaper ────────────────────────────── (B,)
      └─ over the tokens (B, T) ─ token shapers ─ mask ─ (B, T)

Token shapers that multiply (CalibAdv) run before those that add (SRaR): the sum must not be multiplied.

A shaper of your own:

    class Halve(SequenceShaper):
        method = ShaperMethod(key="halve", name="Halve", summary="Halves the advantages of wrong completions.")
        requires = Requires(correct=True)

        def shape(self, ctx, advantages):
            return Shaped(torch.where(ctx.correct, advantages, advantages / 2))

    GRPOTrainer(..., shapers=[Halve()])

Shapes: N rollouts of all processes, in blocks of `group_size` that share a prompt and may straddle processes; B of
them on this process; T tokens, right-padded; F reward functions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch

from hf_rb.methods import ShaperMethod
from hf_rb.methods.registry import find


__all__ = [
    "Requires",
    "SequenceShaper",
    "Shaped",
    "Shaper",
    "ShapingContext",
    "TokenShaper",
    "build_shapers",
    "check_shapers",
    "run_pipeline",
]


@dataclass
class ShapingContext:
    """
    One generation, as the shapers see it. Per-rollout tensors are gathered from all processes and stay on the CPU in
    float32.

    Attributes:
        base (`torch.Tensor` of shape `(N,)`): GRPO's advantages; 0 where `valid` is false.
        group_size (`int`): Rollouts of one prompt; a divisor of N.
        rewards_per_func (`torch.Tensor` of shape `(N, F)`): Rewards before weighting; NaN where a function returned
            None.
        reward_names (`list[str]`): The F names.
        valid (`torch.Tensor` of shape `(N,)` and type `bool`): Whether at least one reward function scored the
            rollout.
        correct (`torch.Tensor` of shape `(N,)` and type `bool`, *optional*): Whether the reward function that
            `correct_reward` names reached `correct_threshold`.
        wrong (`torch.Tensor` of shape `(N,)` and type `bool`, *optional*): Whether it did not. A rollout that this
            function could not score is neither.
        answers (`list[str | None]` of length N, *optional*): Final answers; None where there is none.
        local (`slice`): Which of the N rollouts are this process's.
        rows (`list[dict]` of length B): Dataset rows, with what a `rollout_func` added.
        prompts (`list` of length B): Strings or message lists.
        completions (`list` of length B): Strings or message lists.
        completion_ids (`list[list[int]]` of length B): Token ids without padding; id t belongs to column t of `mask`.
        mask (`torch.Tensor` of shape `(B, T)` and type `bool`): Tokens that the model wrote and the loss counts. On
            the device of the training batch.
        environments (`list`, *optional*): Environment instances of the B rollouts.
        processing_class (`Any`, *optional*): The tokenizer.
        step (`int`): Optimizer steps taken.
        training (`bool`): False in evaluation.
        gather (`Callable[[list], list]`): Puts the lists of all processes together in rollout order: `B` entries in,
            `N` out. Every process must call it equally often.
        sequence_advantages (`torch.Tensor` of shape `(N,)`, *optional*): What the sequence shapers made of `base`: set
            before the first token shaper runs.
    """

    base: torch.Tensor
    group_size: int
    rewards_per_func: torch.Tensor
    reward_names: list[str]
    valid: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor | None = None
    wrong: torch.Tensor | None = None
    answers: list[str | None] | None = None
    local: slice = field(default_factory=lambda: slice(None))
    rows: list[dict] = field(default_factory=list)
    prompts: list = field(default_factory=list)
    completions: list = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    environments: list | None = None
    processing_class: Any = None
    step: int = 0
    training: bool = True
    gather: Callable[[list], list] = list
    sequence_advantages: torch.Tensor | None = None

    def reward(self, name: str) -> torch.Tensor:
        """Rewards of one function, `(N,)`, NaN where it returned None."""
        if name not in self.reward_names:
            raise ValueError(f"There is no reward function {name!r}. Given are {_listed(self.reward_names)}.")
        return self.rewards_per_func[:, self.reward_names.index(name)]


@dataclass
class Shaped:
    """
    Result of a shaper.

    Args:
        advantages (`torch.Tensor`): As many as it was given.
        metrics (`dict[str, float]`, *optional*): Numbers to log, the same on every process; logged as
            `shaping/<name>/<key>`.
        columns (`dict[str, list]`, *optional*): Columns of the completions table, one entry for each of the B rollouts
            of this process.
    """

    advantages: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Requires:
    """
    Requirements of a shaper that a run may lack; checked when the trainer is built.

    Args:
        columns (`tuple[str, ...]`, *optional*): Dataset columns.
        rewards (`tuple[str, ...]`, *optional*): Names of reward functions.
        correct (`bool`, *optional*, defaults to `False`): Whether it reads `ShapingContext.correct` or
            `ShapingContext.wrong`.
        answers (`bool`, *optional*, defaults to `False`): Whether it reads `ShapingContext.answers`.
        tools (`bool`, *optional*, defaults to `False`): Whether it reads the messages of tools.
        one_reward (`bool`, *optional*, defaults to `False`): Whether it takes the only reward function there is for
            the reward.
    """

    columns: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    correct: bool = False
    answers: bool = False
    tools: bool = False
    one_reward: bool = False


class Shaper(Protocol):
    """Base of both kinds of shaper. Subclass [`SequenceShaper`] or [`TokenShaper`]."""

    method: ClassVar[ShaperMethod]
    name: str
    level: Literal["sequence", "token"]
    additive: bool = False
    replaces: bool = False
    requires: Requires = Requires()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls):
            if getattr(cls, "level", cls.method.level) != cls.method.level:
                raise TypeError(
                    f"{cls.__name__} is a shaper of one number a {cls.level}, and its record says `level="
                    f'"{cls.method.level}"`. Derive it from the other base class, or correct the record.'
                )
            cls.name, cls.level, cls.additive = cls.method.key, cls.method.level, cls.method.additive
            cls.replaces = cls.method.replaces

    @classmethod
    def from_config(cls, args: Any, trainer: Any) -> "Shaper":
        """
        Builds the shaper that `advantage_shapers` names. `args` is the config; `trainer` carries what takes more than
        torch: `trainer.answers_equivalent`, `trainer.step_scorer` and `trainer.judge`.
        """
        return cls()

    def shape(self, ctx: ShapingContext, advantages: torch.Tensor) -> Shaped: ...


class SequenceShaper(Shaper, Protocol):
    """Shapes one advantage a rollout: `shape(ctx, advantages)` with advantages `(N,)`, of all processes, on the
    CPU.
    """

    level: Literal["sequence", "token"] = "sequence"


class TokenShaper(Shaper, Protocol):
    """
    Shapes one advantage a token: `shape(ctx, advantages)` with advantages `(B, T)`, of this process, on the batch's
    device. `additive` says that it adds to what it is given; a shaper that multiplies may not follow it.
    """

    level: Literal["sequence", "token"] = "token"


def build_shapers(names: Iterable[str], args: Any, trainer: Any) -> list[Shaper]:
    """
    Builds the shapers that a config names.

    Args:
        names (`Iterable[str]`):
            Names of built-in shapers, or of those that installed packages register under `hf_rb.shapers`.
        args (`GRPOConfig`):
            The config.
        trainer (`GRPOTrainer`):
            The trainer they will shape for.

    Raises:
        ValueError: An unknown name, or one that stands for something else.
    """
    return [find("shaper", name).load().from_config(args, trainer) for name in names]


def _place(shaper: Shaper) -> tuple[bool, bool, bool]:
    is_token = shaper.level == "token"
    return is_token, not getattr(shaper, "replaces", False), is_token and shaper.additive


def check_shapers(
    shapers: Sequence[Shaper],
    columns: Iterable[str],
    reward_names: Sequence[str],
    has_correct: bool,
    has_tools: bool = True,
) -> None:
    """
    Refuses a pipeline that cannot run as written.

    Args:
        shapers (`Sequence[Shaper]`):
            In the order in which they will run.
        columns (`Iterable[str]`):
            Columns of the dataset and fields that the rollouts add.
        reward_names (`Sequence[str]`):
            Names of the reward functions.
        has_correct (`bool`):
            Whether `correct_reward` names one of them.
        has_tools (`bool`, *optional*, defaults to `True`):
            Whether the messages of tools are among the completions.

    Raises:
        TypeError: Something that is not a shaper.
        ValueError: A name twice, an order that would change the result, or something missing that a shaper requires.
    """
    for shaper in shapers:
        if isinstance(shaper, type) or not all(hasattr(shaper, key) for key in ("name", "level", "requires", "shape")):
            raise TypeError(
                f"{shaper!r} is not an advantage shaper. Pass an object whose class derives from `SequenceShaper` or "
                "`TokenShaper` of `hf_rb.advantages` and has a `name`."
            )
    names = [shaper.name for shaper in shapers]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Advantage shapers run once each, and {_listed(repeated)} is listed more than once.")
    ordered = sorted(shapers, key=_place)
    if ordered != list(shapers):
        raise ValueError(
            "Advantage shapers run in the order new advantages, sequence, token-wise factors, token-wise offsets. "
            f"Write `advantage_shapers: [{', '.join(shaper.name for shaper in ordered)}]` instead of "
            f"[{', '.join(names)}]."
        )
    columns = list(columns)
    for shaper in shapers:
        if missing := [column for column in shaper.requires.columns if column not in columns]:
            raise ValueError(
                f"The advantage shaper {shaper.name!r} needs the dataset column {_listed(missing)}, and the columns "
                f"are {_listed(columns)}. Add or rename it, or take {shaper.name!r} out of `advantage_shapers`."
            )
        if missing := [name for name in shaper.requires.rewards if name not in reward_names]:
            raise ValueError(
                f"The advantage shaper {shaper.name!r} needs the reward function {_listed(missing)}, and the reward "
                f"functions are {_listed(reward_names)}. Add it to `reward_funcs`; a weight of 0 keeps it out of the "
                "reward."
            )
        if shaper.requires.correct and not has_correct:
            raise ValueError(
                f"The advantage shaper {shaper.name!r} needs to know which completions are correct. Set "
                f"`correct_reward` to the reward function that says so, one of {_listed(reward_names)}."
            )
        if shaper.requires.one_reward and len(reward_names) > 1:
            raise ValueError(
                f"The advantage shaper {shaper.name!r} needs to know which reward is meant, and there are several. "
                f"Set `correct_reward` to one of {_listed(reward_names)}."
            )
        if shaper.requires.tools and not has_tools:
            raise ValueError(
                f"The advantage shaper {shaper.name!r} reads what tools return, and there are none. Set "
                "`environment: search`, or pass `tools` or `environment_factory`. What a `rollout_func` runs it "
                "cannot see: let that return a field of scores and name it as `calibadv_step_field`."
            )


def run_pipeline(
    ctx: ShapingContext, shapers: Sequence[Shaper]
) -> tuple[torch.Tensor, dict[str, float], dict[str, list]]:
    """
    Runs the shapers on one generation. Every process must call it.

    Args:
        ctx (`ShapingContext`):
            The generation.
        shapers (`Sequence[Shaper]`):
            As [`check_shapers`] accepts them.

    Returns:
        `tuple`: the advantages of this process's rollouts, `(B,)`, or `(B, T)` and 0 outside `ctx.mask` if there is a
        token shaper; the metrics to log, the same on every process: of each shaper its own and, over scored rollouts
        or over tokens in the loss, `mean`, `std`, `changed` (fraction) and `delta_abs` (mean absolute change); and
        columns of the completions table, among them `shaped_advantage` (the mean over a rollout's tokens).

    Raises:
        ValueError: A shaper returned advantages of another shape or not finite, or a column of another length.
    """
    advantages, metrics, columns = ctx.base, {}, {}
    keep, gather = ctx.valid, list  # what counts, and how statistics of this process's part reach the others
    stage = "sequence"
    for shaper in shapers:
        if shaper.level == "token" and stage == "sequence":
            ctx.sequence_advantages, stage = advantages, "token"
            gather, keep = ctx.gather, ctx.mask & ctx.valid[ctx.local].to(ctx.mask.device)[:, None]
            advantages = advantages[ctx.local].to(ctx.mask.device)[:, None] * keep
        shaped = shaper.shape(ctx, advantages)
        _check_result(shaper, shaped, advantages, len(ctx.mask))
        after = torch.where(keep, shaped.advantages, 0)
        stats = _statistics(advantages[keep], after[keep], gather)
        metrics |= {f"shaping/{shaper.name}/{key}": value for key, value in {**stats, **shaped.metrics}.items()}
        columns |= shaped.columns
        advantages = after

    if stage == "sequence":
        advantages = advantages[ctx.local].to(ctx.mask.device)
        columns["shaped_advantage"] = advantages.tolist()
    else:
        columns["shaped_advantage"] = (advantages.sum(1) / keep.sum(1).clamp(min=1)).tolist()
    return advantages, metrics, columns


def _check_result(shaper: Shaper, shaped: Shaped, before: torch.Tensor, rollouts: int) -> None:
    after = shaped.advantages
    if after.shape != before.shape:
        raise ValueError(
            f"The advantage shaper {shaper.name!r} was given advantages of shape {tuple(before.shape)} and returned "
            f"{tuple(after.shape)}. A {shaper.level} shaper keeps the shape."
        )
    if not after.isfinite().all():
        raise ValueError(f"The advantage shaper {shaper.name!r} returned advantages that are not finite.")
    for name, values in shaped.columns.items():
        if len(values) != rollouts:
            raise ValueError(
                f"The column {name!r} of the advantage shaper {shaper.name!r} has {len(values)} entries, and this "
                f"process has {rollouts} rollouts. Return one entry for each, `values[ctx.local]` of all."
            )


def _statistics(before: torch.Tensor, after: torch.Tensor, gather: Callable[[list], list]) -> dict[str, float]:
    before, after = before.cpu().double(), after.cpu().double()
    delta = (after - before).abs()
    parts = (after, after.square(), delta > 0, delta, before * after < 0)
    sums = torch.stack([part.double().sum() for part in parts]).tolist()
    everywhere: list[tuple[float, ...]] = gather([(*sums, after.numel())])
    total, squares, changed, moved, flipped, count = [sum(column) for column in zip(*everywhere, strict=True)]
    count = max(count, 1)
    mean = total / count
    return {
        "mean": mean,
        "std": max(squares / count - mean**2, 0.0) ** 0.5,
        "changed": changed / count,
        "delta_abs": moved / count,
        "flipped": flipped / count,
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
