"""GRPO: TRL's trainer with shapers between its advantages and its loss, and an auxiliary loss beside it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_rb.advantages import ShapingContext, SrarShaper, build_shapers, check_shapers, run_pipeline
from hf_rb.advantages.pipeline import Shaper
from hf_rb.methods.registry import catalog
from hf_rb.ops.backbone import recorded_hidden
from hf_rb.rl.answers import check_gold, require_math_verify, same_answer
from hf_rb.rl.rewards import EXTRACTORS, GOLD_COLUMNS
from hf_rb.trainers.common.configs import own_config
from hf_rb.trainers.common.fused_head import check_fused_head
from hf_rb.trainers.common.generation import OwnDistributionMixin
from hf_rb.trainers.common.mixin import TrainerMixin
from hf_rb.trainers.grpo import hidden_align
from hf_rb.trainers.grpo.config import GRPOConfig
from hf_rb.trainers.grpo.rules import grpo_warnings, pipeline_line
from hf_rb.trainers.grpo.shaping import ScoredGeneration, add_columns, columns_of, make_context, names_of_rewards


__all__ = ["GRPOTrainer"]

logger = logging.getLogger(__name__)


class GRPOTrainer(OwnDistributionMixin, TrainerMixin, trl.GRPOTrainer):
    r"""
    Trainer for GRPO with shaped advantages. Takes what [`~trl.GRPOTrainer`] takes; without shapers and auxiliary loss
    it is that trainer. Generation, tools, rewards, baselines and losses are the parent's in every case.

    `GRPOConfig(advantage_shapers=["edas"], correct_reward="exact_answer_reward")` trains with EDAS
    (https://huggingface.co/papers/2605.17333): of the wrong answers to a prompt, the common ones are pushed down
    harder than the rare ones. [`~hf_rb.advantages.Shaper`] says how to write a shaper.

    `docs/methods.md` lists the numbers that are logged beside TRL's (`eval_` before them in evaluation): of every
    shaper as `shaping/<key>/...`, and of Hidden-Align.

    With `log_completions` the table of completions has the columns `shaped_advantage` (the mean over the completion's
    tokens) and those of the shapers, beside `advantage`, TRL's own. Evaluation shapes too, unless it writes one
    completion a prompt.

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
        optimizers, rollout_func, **kwargs:
            As for [`~trl.GRPOTrainer`].
        environment_factory (`Callable` or `dict`, *optional*):
            As for [`~trl.GRPOTrainer`], in place of `args.environment`.
        shapers (`Sequence[Shaper]`, *optional*):
            Shapers, in place of those that `args.advantage_shapers` names.
        answer_extractor (`Callable[[str], str | None]`, *optional*):
            From the text of a completion to its final answer, in place of `args.answer_extractor`.
        step_scorer (`Callable`, *optional*):
            Says how useful each search step was, in place of the silver documents of `calibadv`. From a
            [`~hf_rb.advantages.ShapingContext`] to a list of scores in [0, 1] for each of its rollouts.
        judge (`Callable`, *optional*):
            Judges the steps of `srar`, in place of `args.srar_judge`.

    Raises:
        ValueError: A shaper needs a dataset column or a reward function that is not there, the order of the shapers
            would change the result, or a column of right answers holds neither texts nor numbers.
        ImportError: `edas_equivalence="math"` without `math-verify`.
    """

    args: GRPOConfig  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        *,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
        shapers: Sequence[Shaper] | None = None,
        answer_extractor: Callable[[str], str | None] | None = None,
        step_scorer: Callable | None = None,
        judge: Callable | None = None,
        **kwargs: Any,
    ):
        args = own_config(GRPOConfig, args, model, "GRPO")
        environment_factory = environment_factory or _environment(args)
        self.answer_extractor = answer_extractor or EXTRACTORS[args.answer_extractor]
        self._extractor_name = repr(args.answer_extractor if answer_extractor is None else answer_extractor)
        if answer_extractor is not None and args.hidden_align_coef and args.hidden_align_marker is None:
            raise ValueError(
                "`hidden_align_coef` takes hidden states before the answer, and with an `answer_extractor` of your "
                "own it does not know the text with which answers begin. Set `hidden_align_marker`."
            )
        self.answers_equivalent = _equivalence(args)
        self.step_scorer = step_scorer or _step_scorer(args)
        self.judge = judge or _judge(args)
        self.shapers = list(build_shapers(args.advantage_shapers, args, self) if shapers is None else shapers)
        self._shapers_of_config = shapers is None
        self.shaping_columns: dict[str, None] = {}
        # All that can be wrong with them before a model is loaded. Of an environment the reward is not known yet.
        evaluation = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets = [data for data in (train_dataset, *evaluation) if data is not None]
        # Without a dataset an environment asks, and TRL makes up empty prompts.
        columns = [columns_of(data) for data in datasets] or [["prompt"]]
        # TRL shows no messages of the tools that a `rollout_func` runs.
        has_tools = rollout_func is None and bool(kwargs.get("tools") or environment_factory)
        if environment_factory is None:
            self._check_shaping(args, columns, names_of_rewards(reward_funcs), rollout_func, has_tools)
        _check_rubrics(self.shapers, datasets)
        _check_answers(reward_funcs, datasets)
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            reward_processing_classes,
            callbacks,
            optimizers,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
            **kwargs,
        )
        self._check_shaping(args, columns, self.reward_func_names, rollout_func, has_tools)
        if args.hidden_align_coef:
            self._check_sequences("`hidden_align_coef`")
        if self.accelerator.is_main_process:
            for message in grpo_warnings(args, any(shaper.level == "token" for shaper in self.shapers)):
                logger.warning(message)
        self._generation: ScoredGeneration | None = None
        self._has_warned_of_infinite = False

    def _check_shaping(
        self,
        args: GRPOConfig,
        columns: list[list[str]],
        reward_names: list[str],
        rollout_func: Callable | None,
        has_tools: bool,
    ) -> None:
        if args.correct_reward is not None and args.correct_reward not in reward_names:
            if not reward_names:
                raise ValueError(
                    f"`correct_reward: {args.correct_reward}` names no reward function, because none was given."
                )
            raise ValueError(
                f"`correct_reward: {args.correct_reward}` is none of the reward functions, {', '.join(reward_names)}."
            )
        # A `rollout_func` adds fields to the rows, which the first generation shows.
        later = [name for shaper in self.shapers for name in shaper.requires.columns] if rollout_func else []
        for names in columns:
            check_shapers(self.shapers, [*names, *later], reward_names, args.correct_reward is not None, has_tools)

    @property
    def _methods(self) -> list[str]:
        names = [shaper.name for shaper in self.shapers] + ["hidden_align"] * bool(self.args.hidden_align_coef)
        known = catalog()
        return [name for name in names if name in known and known[name].paper]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._acts:
            names = None if self._shapers_of_config else [shaper.name for shaper in self.shapers]
            self.accelerator.print(pipeline_line(self.args, names))
        return super().train(*args, **kwargs)

    # Where rewards and advantages pass by

    @property
    def _acts(self) -> bool:
        return bool(self.shapers or self.args.hidden_align_coef)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._warn_of_infinite(rewards_per_func)
        if self._acts:
            self._generation = ScoredGeneration(inputs, prompts, completions, completion_ids_list, rewards_per_func)
        return rewards_per_func

    def _warn_of_infinite(self, rewards: torch.Tensor) -> None:
        """Says once which reward function has returned infinity: TRL goes on without a word."""
        names = [self.reward_func_names[index] for index in rewards.isinf().any(dim=0).nonzero().flatten()]
        if names and not self._has_warned_of_infinite and self.accelerator.is_main_process:
            self._has_warned_of_infinite = True
            logger.warning(
                f"The reward function {names[0]} returned infinity at step {self.state.global_step}, so its group "
                "has no advantages: TRL trains with 0 or the largest number in place of them. Return a finite "
                "number, or `None` for no reward."
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._acts:
            scored, self._generation = cast(ScoredGeneration, self._generation), None
            context = make_context(self, output, scored)
            if self.shapers:
                self._shape(output, context)
            if self.args.hidden_align_coef:
                hidden_align.add_targets(self, output, context)
        return output

    def _shape(self, output: dict[str, Any], context: ShapingContext) -> None:
        check_shapers(self.shapers, context.rows[0], context.reward_names, context.correct is not None)
        metrics, columns = {}, {}
        if (
            context.group_size > 1
        ):  # a completion alone in its group, as in some evaluations, has nothing to be compared with
            advantages, metrics, columns = run_pipeline(context, self.shapers)
            output["advantages"] = advantages.to(output["advantages"].dtype)
        if context.answers is not None:
            metrics["shaping/answered"] = self._answered(context.answers)
        for name, value in metrics.items():
            self._metrics["train" if context.training else "eval"][name].append(value)
        add_columns(self, columns, len(context.prompts))

    def _answered(self, answers: list[str | None]) -> float:
        answered = sum(answer is not None for answer in answers) / len(answers)
        if answered == 0 and self.accelerator.is_main_process:
            logger.warning(
                f"No completion of step {self.state.global_step} has an answer for the answer extractor "
                f"{self._extractor_name}: to the shapers all are the same."
            )
        return answered

    # The loss

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        check_fused_head(
            self, model, "Train another model, or this one with `GKDTrainer`, which takes its own logits."
        )
        if "align_weight" not in inputs:
            return super()._compute_loss(model, inputs)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        with recorded_hidden(unwrapped) as states:
            loss = super()._compute_loss(model, inputs)
        return loss + hidden_align.auxiliary_loss(self, inputs, states[0]).to(loss.device)


def _equivalence(args: GRPOConfig) -> Callable[[str, str], bool] | None:
    if args.edas_equivalence == "string":
        return None
    if args.edas_equivalence == "math":
        require_math_verify("edas_equivalence: math")
    return same_answer


def _step_scorer(args: GRPOConfig) -> Callable | None:
    if "calibadv" not in args.advantage_shapers:
        return None
    from hf_rb.rl.agents import step_scorer

    return step_scorer(args)


def _judge(args: GRPOConfig) -> Callable | None:
    if args.srar_judge is None:
        return None
    from hf_rb.rl.judges import judge_from_config

    return judge_from_config(args)


def _check_rubrics(shapers: Sequence[Shaper], datasets: list) -> None:
    for shaper in shapers:
        if isinstance(shaper, SrarShaper):
            from hf_rb.rl.judges import check_rubrics

            for data in datasets:
                if shaper.rubric_column in columns_of(data):
                    check_rubrics(data, shaper.rubric_column)


def _check_answers(reward_funcs: Any, datasets: list) -> None:
    functions = (
        reward_funcs if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str) else [reward_funcs]
    )
    for function in functions:
        function = getattr(function, "func", function)  # that of a partial
        for known, column in GOLD_COLUMNS.items():
            for data in datasets if function is known else ():
                check_gold(column, data)


def _environment(args: GRPOConfig) -> Callable | None:
    if args.environment is None:
        return None
    from hf_rb.rl.agents import environment_factory

    return environment_factory(args)
