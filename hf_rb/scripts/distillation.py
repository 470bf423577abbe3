"""Distillation on the student's own completions.

```bash
accelerate launch -m hf_rb.scripts.distillation --config recipes/exopd/tiny-cpu.yaml
```

```bash
accelerate launch -m hf_rb.scripts.distillation \
    --model_name_or_path Qwen/Qwen3-1.7B \
    --teacher_model_name_or_path Qwen/Qwen3-4B \
    --dataset_name trl-lib/DeepMath-103K \
    --objective gopd \
    --reward_scale 1.25 \
    --learning_rate 1e-5 \
    --use_peft \
    --output_dir Qwen3-1.7B-ExOPD
```
"""

from collections.abc import Sequence
from typing import Any

import trl

from hf_rb import DistillationConfig, DistillationTrainer
from hf_rb.scripts import _common


__all__ = ["build", "main", "make_parser", "prepare"]


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return _common.make_parser(DistillationConfig, "distillation")


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.read(make_parser(), argv)
    if args.teacher_model_name_or_path is None:
        raise ValueError(
            "There is no teacher. Set `teacher_model_name_or_path` to a Hub id, a folder or `tiny:teacher`."
        )
    splits = _common.load_splits(script_args, args, mixture)
    for split in filter(None, splits):
        columns = set(_common.columns_of(split))
        for name in filter(None, ("prompt", args.gopd_teacher_column)):
            if name not in columns:
                raise ValueError(
                    f"The dataset has the columns {', '.join(sorted(columns))}. Distillation needs `{name}`: "
                    + (
                        "the student writes the completions."
                        if name == "prompt"
                        else "`gopd_teacher_column` names it."
                    )
                )
    return script_args, args, model_args, mixture, splits


def build(
    script_args: _common.ScriptArguments,
    args: DistillationConfig,
    model_args: trl.ModelConfig,
    mixture: trl.DatasetMixtureConfig,
    splits: Sequence[Any],
) -> DistillationTrainer:
    """Loads the models and returns the trainer."""
    return _common.make_trainer(DistillationTrainer, args, model_args, splits)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    _common.run(prepare, build, argv)


if __name__ == "__main__":
    _common.run(prepare, build, name="hf_rb.scripts.distillation")
