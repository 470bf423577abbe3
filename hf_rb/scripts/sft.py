"""Supervised fine-tuning, with ProFit where the recipe sets `profit_threshold`.

```bash
accelerate launch -m hf_rb.scripts.sft --config recipes/profit/tiny-cpu.yaml
```

```bash
accelerate launch -m hf_rb.scripts.sft \
    --model_name_or_path Qwen/Qwen3-0.6B-Base \
    --dataset_name trl-lib/Capybara \
    --profit_threshold 0.1 \
    --learning_rate 1e-5 \
    --use_peft \
    --output_dir Qwen3-0.6B-ProFit
```
"""

from collections.abc import Sequence

import trl

from hf_rb import SFTConfig, SFTTrainer
from hf_rb.scripts import _common


__all__ = ["build", "main", "make_parser", "prepare"]


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return _common.make_parser(SFTConfig, "sft")


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.read(make_parser(), argv)
    splits = _common.load_splits(script_args, args, mixture)
    splits = [split and _with_known_format(split, args) for split in splits]
    return script_args, args, model_args, mixture, splits


def _with_known_format(dataset, args: SFTConfig):
    columns = set(_common.columns_of(dataset))
    if "prompt" in columns and "completion" not in columns:  # the prompt beside full transcripts, or a wrong dataset
        dataset, columns = dataset.remove_columns("prompt"), columns - {"prompt"}
    if not columns & {"messages", "conversations", "prompt", "input_ids", args.dataset_text_field}:
        raise ValueError(
            f"The dataset has the columns {', '.join(sorted(columns))}. SFT needs `messages`, `prompt` with `completion`, or "
            f"`{args.dataset_text_field}`; set `dataset_text_field` if the text has another name."
        )
    return dataset


def build(script_args, args, model_args, mixture, splits) -> SFTTrainer:
    """Loads the models and returns the trainer."""
    return _common.make_trainer(SFTTrainer, args, model_args, splits)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    _common.run(prepare, build, argv)


if __name__ == "__main__":
    _common.run(prepare, build, name="hf_rb.scripts.sft")
