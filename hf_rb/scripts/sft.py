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

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.scripts import _common
from hf_rb.scripts._common import ScriptArguments


__all__ = ["main", "make_parser"]


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return trl.TrlParser(
        (ScriptArguments, SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig),
        prog="python -m hf_rb.scripts.sft",
        allow_abbrev=False,
    )


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.parse(make_parser(), argv)
    if model_args.model_name_or_path is None:
        raise ValueError("There is no model. Set `model_name_or_path` to a Hub id, a folder or `tiny:student`.")
    _common.check_output_dir(args, script_args.overwrite)
    splits = _common.load_splits(script_args, mixture, evaluation=args.eval_strategy != "no")
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


def train(script_args, args, model_args, mixture, splits) -> None:
    args.model_init_kwargs = _common.model_init_kwargs(model_args, args)
    trainer = SFTTrainer(
        tiny.resolve(model_args.model_name_or_path),
        args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )
    _common.train_and_save(trainer, script_args, model_args, mixture)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    train(*prepare(argv))


if __name__ == "__main__":
    with _common.readable_errors("hf_rb.scripts.sft"):
        prepared = prepare()
    train(*prepared)
