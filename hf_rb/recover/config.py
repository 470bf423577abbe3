"""The keys of a recipe for `hf-rb recover`, importable without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rb.methods import Method, Paper
from hf_rb.methods.registry import methods
from hf_rb.utils.dtypes import WEIGHT_TYPES_OR_AUTO
from hf_rb.utils.fields import described, documented, flag, validate


__all__ = ["TRAINING", "RecoverConfig", "objectives", "recover_rules"]

METHOD = Method(
    key="recover",
    name="Quantization Meets Reasoning",
    paper=Paper(
        "2501.03035",
        "Quantization Meets Reasoning: Exploring LLM Low-Bit Quantization Degradation for Mathematical Reasoning",
        "Zhen Li, Yupeng Su, Runming Yang, Congkai Xie, Zheng Wang, Zhongwei Xie, Ngai Wong, Hongxia Yang",
    ),
    summary="A small repair set from the problems that quantization has broken; here the full-precision "
    "model's own solutions, towards which an adapter on the packed weights is trained.",
)

# Defaults of `training`. Ours; the papers' rates are between 1e-5 and 2e-4, their runs of one to three epochs.
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}


@documented
@dataclass
class RecoverConfig:
    """
    The keys of a recipe for `hf-rb recover`.

    There are problems (`task`, `pool`), text (`train_text`, `eval_text`) or both. Every pair of an objective and a
    number of examples is trained and measured; the first of each is what the package gets.

    Args:
        model_name_or_path (`str`):
            The model to quantize, which is also the teacher: a folder, a Hub id or an embedded model (`tiny:teacher`).
        output_dir (`str`):
            Folder for the stages and, in `model`, for the result. A run that was stopped goes on in it, and one whose
            recipe has changed repeats what that concerns.

    Raises:
        ValueError: A value out of its range, or keys that do not go together.
    """

    model_name_or_path: str = field(metadata=described("The model to quantize, which is also the teacher."))
    output_dir: str = field(metadata=described("Folder for the stages and the result."))
    quantization_config: dict[str, Any] = flag(
        {}, "`quant_method` and the fields of its config. Defaults to PTQTP as [`PTQTPConfig`] has it."
    )
    baseline: bool = flag(
        True,
        "Whether to do the same to the model rounded to 3 bits, group by group, which is what any reader would try"
        " first.",
    )
    task: str | None = flag(
        None,
        "Held-out problems whose exact match is measured: `tiny:math`, or a JSON-lines file in the format of GSM8K.",
    )
    pool: str | None = flag(
        None,
        "Other problems, among which what quantization has broken is looked for. Defaults to the training split of"
        " an embedded task.",
    )
    eval_text: str | None = flag(
        None,
        "Held-out text whose perplexity is measured: a text file, a JSON-lines file with the column `text`, or a "
        "dataset of the Hub (`NAME:CONFIG`, split `test`). Of it the first 16,384 tokens count.",
    )
    train_text: str | None = flag(
        None, "Text of the same kinds (split `train`), windows of which are the ordinary data of the repair set."
    )
    eval_problems: int = flag(200, "Problems of `task` at most.", range="[1, inf)")
    pool_problems: int = flag(1000, "Problems of `pool` at most.", range="[1, inf)")
    max_new_tokens: int = flag(256, "Limit of a generated solution.", range="[1, inf)")
    examples: list[int] = flag([450], "Budgets: sizes of the repair set. The papers have 332 and 545 examples.")
    failing_share: float = flag(
        0.67,
        "Part of the repair set that is about problems which quantization has broken, if there are as many. The "
        "rest is ordinary data: windows of `train_text`, or else problems of the pool that it has not broken.",
        range="(0, 1]",
    )
    text_tokens: int = flag(256, "Tokens of a window of `train_text`.", range="[2, inf)")
    objectives: list[str] = flag(
        ["forward_kl"],
        "What is trained on the teacher's solutions: an objective of `hf-rb gkd` towards the teacher's distributions, "
        "or `sft` on its tokens. Several for a comparison.",
    )
    cached_teacher: bool = flag(
        False, "Whether the teacher runs once over the repair set, and `forward_kl` and `akl` train without it."
    )
    lora_r: int = flag(32, "Rank of the adapter.", range="[1, inf)")
    lora_alpha: int = flag(64, "Scale of the adapter times its rank.", range="[1, inf)")
    training: dict[str, Any] = flag(
        {},
        "Fields of [`GKDConfig`] for all runs, such as `learning_rate`, over our defaults: 2e-4, three epochs, "
        "batches of 8, cosine.",
    )
    merge: bool = flag(
        False,
        "Whether the package is an ordinary model of the type `dtype` with the adapter merged in, in place of the "
        "packed base and its adapter. Merging into packed weights is refused: they would be rounded again, and "
        "what the adapter makes up for with them.",
    )
    dtype: str = flag(
        "auto",
        "Type in which the models are measured and trained; `auto` is that of the files.",
        choices=WEIGHT_TYPES_OR_AUTO,
    )
    eval_batch_size: int = flag(64, "Problems solved at a time.", range="[1, inf)")
    seed: int = flag(42, "Seed of the choice of examples, of the adapter and of the training.")
    overwrite: bool = flag(False, "Whether to replace what `output_dir` holds, stages and result.")

    def __post_init__(self):
        validate(self, recover_rules)
        if self.pool is None and self.task and self.task.startswith("tiny:"):
            self.pool = self.task
        self.quantization_config = {"quant_method": "ptqtp"} | self.quantization_config


# What the pipeline itself says of a run.
OWN = (
    "output_dir",
    "objective",
    "lmbda",
    "kd_alpha",
    "teacher_cache",
    "teacher_model_name_or_path",
    "seed",
    "overwrite",
)


def objectives() -> list[str]:
    """Returns what may be trained: the objectives on completions that are given, and plain fine-tuning."""
    return [name for name, entry in methods("objective").items() if entry.method.completions != "student"] + ["sft"]


def recover_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with a recipe for `hf-rb recover`."""
    for name in config.objectives:
        if name not in objectives():
            yield f"`objectives` cannot have {name!r}; write some of {', '.join(objectives())}."
        elif config.cached_teacher and name != "sft" and not methods("objective")[name].method.cached:
            yield f"`objectives: [{name}]` needs the teacher's whole distribution: write `cached_teacher: false`."
    for name in ("objectives", "examples"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            yield f"`{name}: {values}` must hold one value or several different ones."
    for number in config.examples:
        if number < 1:
            yield f"`examples` cannot have {number}; write 1 or more."
    if config.task is None and config.eval_text is None:
        yield (
            "there is nothing to measure: write `task: tiny:math` or a file of problems, or `eval_text` and "
            "`train_text`."
        )
    if config.task and config.pool is None and not config.task.startswith("tiny:"):
        yield f"`task: {config.task}` is held out: write `pool: ...`, a file of other problems to learn from."
    if config.task is None and config.pool is not None:
        yield "`pool` is for problems: write `task` too, the held-out ones."
    if config.eval_text and not config.task and config.train_text is None:
        yield "`eval_text` is held out: write `train_text: ...`, other text to learn from."
    for name in OWN:
        if name in config.training:
            yield (
                f"`training` cannot have `{name}`, which the pipeline sets. Remove it, or write the recipe's own key."
            )
    for name in ("task", "pool"):
        path = getattr(config, name)
        if path and path != "tiny:math" and not Path(path).is_file():
            yield f"`{name}` names {path!r}, which does not exist: write tiny:math or a JSON-lines file."
