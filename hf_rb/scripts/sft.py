"""Supervised fine-tuning, with ProFit where the recipe sets `profit_threshold`, Shadow-FT where it sets `graft_onto`.

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
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import trl
from transformers import AutoTokenizer

from hf_rb import SFTConfig, SFTTrainer, tiny
from hf_rb.scripts import _common
from hf_rb.utils.fields import documented, flag
from hf_rb.weights.rules import graft_rules


__all__ = ["SFTScriptArguments", "build", "main", "make_parser", "prepare"]


@documented
@dataclass
class SFTScriptArguments(_common.ScriptArguments):
    """Script arguments of every trainer, and those of Shadow-FT (https://huggingface.co/papers/2505.12716)."""

    graft_onto: str | None = flag(
        None,
        "Instruct model that gets what the model in training, its Base, has learned. Base is trained with its "
        "tokenizer and chat template.",
    )
    graft_output_dir: str | None = flag(None, "Folder for the grafted model. Defaults to `grafted` in `output_dir`.")
    graft_include: str | None = flag(
        None,
        "Tensors that get their delta: `linear`, `all` or a regular expression. Defaults to `linear`, with "
        "adapters to all that they adapt.",
    )
    graft_dtype: str | None = flag(
        None,
        "Type of the grafted model. Defaults to that of the Instruct model; in 16 bits small deltas are rounded away.",
        choices=("float32", "bfloat16", "float16"),
    )


def make_parser() -> trl.TrlParser:
    """Returns the parser of a recipe's keys."""
    return _common.make_parser(SFTConfig, "sft", SFTScriptArguments)


def prepare(argv: Sequence[str] | None = None) -> tuple:
    """Reads the arguments and the data; everything that can be wrong before a model is loaded is found here."""
    script_args, args, model_args, mixture = _common.read(make_parser(), argv)
    for problem in graft_rules(SimpleNamespace(**vars(args) | vars(model_args) | vars(script_args))):
        raise ValueError(problem)
    if script_args.graft_onto:
        _check_pair(model_args.model_name_or_path, script_args.graft_onto)
    splits = _common.load_splits(script_args, args, mixture)
    splits = [split and _with_known_format(split, args) for split in splits]
    return script_args, args, model_args, mixture, splits


def _check_pair(base: str, onto: str) -> None:
    """Refuses models of which one cannot read the other's token ids."""
    from hf_rb.weights.source import Source, vocabulary_problem

    sources = Source("model_name_or_path", base), Source("graft_onto", onto)
    if problem := vocabulary_problem(*sources):
        raise ValueError(
            f"{problem}. Base is trained with the Instruct model's tokenizer: give two models of one family."
        )
    width, tokens = sources[0].config.get("vocab_size"), sources[1].vocabulary()
    if width and tokens and max(tokens) >= width:
        raise ValueError(
            f"The tokenizer of {onto} has the id {max(tokens)} ({tokens[max(tokens)]!r}), and {base} has {width} "
            "embeddings. Give two models of one family."
        )


def _with_known_format(dataset: Any, args: SFTConfig) -> Any:
    columns = set(_common.columns_of(dataset))
    if "prompt" in columns and "completion" not in columns:  # the prompt beside full transcripts, or a wrong dataset
        dataset, columns = dataset.remove_columns("prompt"), columns - {"prompt"}
    if not columns & {"messages", "conversations", "prompt", "input_ids", args.dataset_text_field}:
        raise ValueError(
            f"The dataset has the columns {', '.join(sorted(columns))}. SFT needs `messages`, `prompt` with "
            f"`completion`, or `{args.dataset_text_field}`; set `dataset_text_field` if the text has another name."
        )
    return dataset


def build(
    script_args: SFTScriptArguments,
    args: SFTConfig,
    model_args: trl.ModelConfig,
    mixture: trl.DatasetMixtureConfig,
    splits: Sequence[Any],
) -> SFTTrainer:
    """Loads the models and returns the trainer."""
    if script_args.graft_onto is None:
        return _common.make_trainer(SFTTrainer, args, model_args, splits)
    from hf_rb.weights import GraftCallback

    tokenizer = AutoTokenizer.from_pretrained(tiny.resolve(script_args.graft_onto))
    trainer = _common.make_trainer(SFTTrainer, args, model_args, splits, processing_class=tokenizer)
    graft = GraftCallback(
        trainer,
        script_args.graft_onto,
        script_args.graft_output_dir,
        include=script_args.graft_include,
        dtype=script_args.graft_dtype,
        overwrite=script_args.overwrite,
    )
    trainer.add_callback(graft)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Raises:
        ValueError, OSError: Something is wrong with the recipe, the data or the output folder. No model was loaded.
    """
    _common.run(prepare, build, argv)


if __name__ == "__main__":
    _common.run(prepare, build, name="hf_rb.scripts.sft")
