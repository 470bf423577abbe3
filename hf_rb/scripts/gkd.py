"""Distillation on the dataset's completions, the student's own, or a mixture.

```bash
accelerate launch -m hf_rb.scripts.gkd --config recipes/akl/tiny-cpu.yaml
```

```bash
accelerate launch -m hf_rb.scripts.gkd \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --teacher_model_name_or_path Qwen/Qwen3-4B \
    --dataset_name trl-lib/Capybara \
    --objective akl \
    --lmbda 0.0 \
    --kd_alpha 0.5 \
    --learning_rate 1e-5 \
    --output_dir Qwen3-0.6B-AKL
```
"""

from collections.abc import Sequence
from typing import Any

import trl

from hf_rb import GKDConfig, GKDTrainer
from hf_rb.scripts import _common


__all__ = ["build", "main", "make_parser", "prepare"]


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return _common.make_parser(GKDConfig, "gkd")


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.read(make_parser(), argv)
    if args.teacher_model_name_or_path is None and args.teacher_cache is None:
        raise ValueError(
            "There is no teacher. Set `teacher_model_name_or_path` to a Hub id, a folder or `tiny:teacher`, or "
            "`teacher_cache` to a folder of `hf-rb cache-teacher`."
        )
    splits = _common.load_splits(script_args, args, mixture)
    for split in filter(None, splits):
        columns = set(_common.columns_of(split))
        if not columns & {"messages", "conversations", "prompt", "input_ids", args.dataset_text_field}:
            raise ValueError(
                f"The dataset has the columns {', '.join(sorted(columns))}. GKD needs `messages`, `prompt` with "
                f"`completion` (or alone with `lmbda: 1.0`), or `{args.dataset_text_field}`; set "
                "`dataset_text_field` if the text has another name."
            )
    return script_args, args, model_args, mixture, splits


def build(
    script_args: _common.ScriptArguments,
    args: GKDConfig,
    model_args: trl.ModelConfig,
    mixture: trl.DatasetMixtureConfig,
    splits: Sequence[Any],
) -> GKDTrainer:
    """Loads the models and returns the trainer."""
    return _common.make_trainer(GKDTrainer, args, model_args, splits)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    _common.run(prepare, build, argv)


if __name__ == "__main__":
    _common.run(prepare, build, name="hf_rb.scripts.gkd")
