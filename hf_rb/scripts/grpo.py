"""GRPO with shaped advantages.

```bash
accelerate launch -m hf_rb.scripts.grpo --config recipes/edas/tiny-cpu.yaml
```

```bash
accelerate launch -m hf_rb.scripts.grpo \
    --model_name_or_path Qwen/Qwen3-8B \
    --dataset_name open-r1/DAPO-Math-17k-Processed \
    --dataset_config en \
    --reward_funcs math_accuracy_reward \
    --correct_reward math_accuracy_reward \
    --advantage_shapers edas \
    --edas_equivalence math \
    --output_dir Qwen3-8B-EDAS
```

A recipe may name code, `module:attribute`, as a reward function or as a shaper. It is imported only if the command
line names it too: `--allow_local_code module:attribute`, as often as needed.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import trl

from hf_rb import GRPOConfig, GRPOTrainer
from hf_rb.rl.rewards import build_reward, reward_problem
from hf_rb.scripts import _common
from hf_rb.utils.fields import documented, flag


__all__ = ["GRPOScriptArguments", "build", "main", "make_parser", "prepare"]


@documented
@dataclass
class GRPOScriptArguments(_common.ScriptArguments):
    """Script arguments of every trainer, and those of GRPO."""

    reward_funcs: list[str] | None = flag(
        None,
        "Reward functions: `exact_answer_reward`, `math_accuracy_reward`, `answer_format_reward`, "
        "`step_format_reward`, `search_f1`, those of TRL's script, or `module:attribute` of code that "
        "`--allow_local_code` allows.",
    )
    reward_model_name_or_path: str | None = flag(
        None, "Reward model, a Hub id or a folder. It comes before the functions of `reward_funcs`."
    )


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return _common.make_parser(GRPOConfig, "grpo", GRPOScriptArguments)


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.read(make_parser(), argv)
    if not script_args.reward_funcs and not script_args.reward_model_name_or_path:
        raise ValueError("There is no reward. Set `reward_funcs`, such as `reward_funcs: [exact_answer_reward]`.")
    functions = _reward_functions(script_args, args)
    splits = _common.load_splits(script_args, args, mixture)
    for split in filter(None, splits):
        columns = _common.columns_of(split)
        # An environment asks a row's question itself.
        if "prompt" not in columns and not (args.environment and "question" in columns):
            raise ValueError(f"The dataset has the columns {', '.join(sorted(columns))}. GRPO needs `prompt`.")
        for name, function in zip(script_args.reward_funcs or [], functions, strict=True):
            if missing := _missing(function, columns):
                raise ValueError(
                    f"The dataset has the columns {', '.join(sorted(columns))}. The reward function {name!r} needs "
                    f"{' and '.join(f'`{column}`' for column in missing)}."
                )
    return script_args, args, model_args, mixture, splits


def _reward_functions(script_args: GRPOScriptArguments, args: GRPOConfig) -> list[Callable]:
    names = script_args.reward_funcs or []
    for problem in filter(None, map(reward_problem, names)):
        raise ValueError(problem)
    return [build_reward(name, args.answer_extractor) for name in names]


_GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def _missing(function: Callable, columns: Iterable[str]) -> list[str]:
    """Parameters of a reward function that are columns, and that the dataset does not have."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in variadic and name not in {*_GIVEN, *columns}
    ]


def build(
    script_args: GRPOScriptArguments,
    args: GRPOConfig,
    model_args: trl.ModelConfig,
    mixture: trl.DatasetMixtureConfig,
    splits: Sequence[Any],
) -> GRPOTrainer:
    """Loads the models and returns the trainer."""
    reward_model = script_args.reward_model_name_or_path
    rewards = [*([reward_model] if reward_model else []), *_reward_functions(script_args, args)]
    return _common.make_trainer(GRPOTrainer, args, model_args, splits, reward_funcs=rewards)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    _common.run(prepare, build, argv)


if __name__ == "__main__":
    _common.run(prepare, build, name="hf_rb.scripts.grpo")
