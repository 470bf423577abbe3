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

import trl

from hf_rb import DistillationConfig, DistillationTrainer, tiny
from hf_rb.scripts import _common
from hf_rb.scripts._common import ScriptArguments


__all__ = ["build", "main", "make_parser", "prepare"]


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return trl.TrlParser(
        (ScriptArguments, DistillationConfig, trl.ModelConfig, trl.DatasetMixtureConfig),
        prog="python -m hf_rb.scripts.distillation",
        allow_abbrev=False,
    )


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.parse(make_parser(), argv)
    if model_args.model_name_or_path is None:
        raise ValueError("There is no model. Set `model_name_or_path` to a Hub id, a folder or `tiny:student`.")
    if args.teacher_model_name_or_path is None:
        raise ValueError(
            "There is no teacher. Set `teacher_model_name_or_path` to a Hub id, a folder or `tiny:teacher`."
        )
    _common.check_output_dir(args, script_args.overwrite)
    splits = _common.load_splits(script_args, mixture, evaluation=args.eval_strategy != "no")
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


def build(script_args, args, model_args, mixture, splits) -> DistillationTrainer:
    """Loads the models and returns the trainer."""
    args.model_init_kwargs = _common.model_init_kwargs(model_args, args)
    return DistillationTrainer(
        tiny.resolve(model_args.model_name_or_path),
        args=args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )


def train(script_args, args, model_args, mixture, splits) -> None:
    trainer = build(script_args, args, model_args, mixture, splits)
    _common.train_and_save(trainer, script_args, model_args, mixture)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    train(*prepare(argv))


if __name__ == "__main__":
    with _common.readable_errors("hf_rb.scripts.distillation"):
        prepared = prepare()
    train(*prepared)
