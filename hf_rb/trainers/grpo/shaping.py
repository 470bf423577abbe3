"""Way from a GRPO trainer to the advantage shapers and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from hf_rb.advantages import ShapingContext
from hf_rb.rl.rewards import completion_text
from hf_rb.utils import compat


__all__ = ["ScoredGeneration", "add_columns", "columns_of", "make_context", "names_of_rewards"]


@dataclass
class ScoredGeneration:
    """
    Values that TRL's trainer has while it scores a generation and does not return: B rollouts of this process, rewards
    of all N.
    """

    rows: list[dict[str, Any]]
    prompts: list
    completions: list
    completion_ids: list[list[int]]
    rewards_per_func: torch.Tensor


def make_context(trainer: Any, output: dict[str, Any], generation: ScoredGeneration) -> ShapingContext:
    """
    Puts together what the shapers see. Every process must call it.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer.
        output (`dict`):
            What TRL's trainer made of the generation.
        generation ([`ScoredGeneration`]):
            What it did not return.
    """
    args, count = trainer.args, len(generation.prompts)
    rewards, names = generation.rewards_per_func.cpu().float(), trainer.reward_func_names
    correct = wrong = answers = None
    if args.correct_reward is not None:
        reward = rewards[:, names.index(args.correct_reward)]
        correct, wrong = reward >= args.correct_threshold, reward < args.correct_threshold  # a NaN is neither
    if any(shaper.requires.answers for shaper in trainer.shapers):
        answers = gather_object([trainer.answer_extractor(completion_text(one)) for one in generation.completions])
    mask = output["completion_mask"]
    start = trainer.accelerator.process_index * count
    training = trainer.model.training
    return ShapingContext(
        base=trainer.accelerator.gather(output["advantages"]).cpu().float(),
        group_size=trainer.num_generations if training else trainer.num_generations_eval,
        rewards_per_func=rewards,
        reward_names=names,
        valid=~rewards.isnan().all(1),
        correct=correct,
        wrong=wrong,
        answers=answers,
        local=slice(start, start + count),
        rows=generation.rows,
        prompts=generation.prompts,
        completions=generation.completions,
        completion_ids=generation.completion_ids,
        mask=(mask * output.get("tool_mask", 1)).bool(),
        environments=trainer.environments,
        processing_class=trainer.processing_class,
        step=trainer.state.global_step,
        training=training,
        gather=gather_object,
    )


def add_columns(trainer: Any, columns: dict[str, list], count: int) -> None:
    """
    Adds columns to TRL's table of completions, after it has added a generation's rows. Every process must call it.

    The table is made of columns of equal length, which keep as many last rows as a generation has. What is missing,
    because a column is new or this generation does not have it, is `None`.

    Args:
        trainer ([`GRPOTrainer`]):
            The trainer.
        columns (`dict[str, list]`):
            Of this process's rollouts.
        count (`int`):
            How many these are.
    """
    rows = gather_object([{name: values[i] for name, values in columns.items()} for i in range(count)])
    trainer.shaping_columns |= dict.fromkeys(rows[0])
    for name in trainer.shaping_columns:
        column = trainer._logs["extra"][name]
        column.extend([None] * (len(trainer._logs["prompt"]) - len(rows) - len(column)))
        column.extend(row.get(name) for row in rows)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Returns the column names, of a streamed dataset those of its first row."""
    return list(dataset.column_names or next(iter(dataset)))


def names_of_rewards(reward_funcs: Any) -> list[str]:
    """Returns the names under which TRL's trainer will know reward functions and reward models, before it loads
    any.
    """
    functions = (
        reward_funcs if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str) else [reward_funcs]
    )
    return [_name(function) for function in functions if function is not None]


def _name(function: Any) -> str:
    if isinstance(function, torch.nn.Module):
        config: Any = function.config
        function = config._name_or_path
    return function.split("/")[-1] if isinstance(function, str) else compat.get_callable_name(function)
