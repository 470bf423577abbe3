"""The rules of each verb's recipes: what depends on several keys, or on what is on this machine. Nothing is loaded."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_rb import tiny
from hf_rb.cli import schemas
from hf_rb.io.data_files import dataset_rules, file_problem, text_problem
from hf_rb.io.resources import recipe_names
from hf_rb.methods.registry import methods
from hf_rb.methods.rules import defaults_of
from hf_rb.recover.config import recover_rules
from hf_rb.rl.rewards import reward_name, reward_problem
from hf_rb.trainers.common.rules import packing_rules, trainer_rules
from hf_rb.trainers.distillation.rules import distillation_rules
from hf_rb.trainers.gkd.rules import gkd_rules
from hf_rb.trainers.grpo.rules import agent_rules, grpo_recipe_rules, grpo_rules
from hf_rb.utils.fields import Rule, value_problem
from hf_rb.weights.rules import graft_rules


__all__ = ["RULES", "TRAINED", "group_warnings", "training_rules", "upcycle_rules"]


def _name_rules(args: Any) -> Iterator[str]:
    """Names of embedded assets, paths that can only be local, and where the result goes."""
    if args.output_dir and Path(args.output_dir).is_file():
        yield f"`output_dir` names {args.output_dir!r}, which is a file: write a folder."
    keys = ("model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path", "dataset_name")
    for key, name in ((one, name) for one in keys for name in _texts(getattr(args, one, None))):
        if key == "dataset_name" and (problem := file_problem(name)):
            yield problem
        elif name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
            yield f"`{key}` names {name!r}, which does not exist."
        elif name in recipe_names() or name.endswith((".yaml", ".yml")):
            yield f"`{key}` names {name!r}, which is a recipe: write `--config {name}`, or the name of a model."
        if key != "dataset_name":
            try:
                tiny.resolve(name)
            except ValueError as error:
                yield f"`{key}`: {error}"


def _text_rules(args: Any) -> Iterator[str]:
    """Texts for calibration and measurement."""
    for key in ("eval_data", "eval_text", "train_text"):
        if (name := getattr(args, key, None)) and (problem := text_problem(key, name)):
            yield problem


def _tracker_rules(args: Any) -> Iterator[str]:
    """Names for `report_to`, of transformers."""
    for name in _texts(args.report_to):
        yield from filter(None, [value_problem("report_to", name, choices=TRACKERS)])


def _precision_rules(args: Any) -> Iterator[str]:
    if args.fp16 and args.bf16:
        yield "`fp16` and `bf16` are both true. Remove one."
    if args.fp16 and args.use_cpu:
        yield "`fp16: true` needs a GPU, and `use_cpu` is true. Write `bf16: true` or `bf16: false` instead."


def _source_rules(args: Any) -> Iterator[str]:
    """A model and a dataset are named, and the local files among the data exist."""
    if not args.model_name_or_path:
        yield "no model: write `model_name_or_path: ...`."
    if not args.dataset_name and not args.datasets:
        yield "no dataset: write `dataset_name: ...` or a list `datasets: ...`."
    for index, dataset in enumerate(args.datasets):
        for file in _texts(dataset["data_files"]):
            # A pattern or an address is for `datasets` to resolve.
            if not re.search(r"[*?\[]|://", file) and not Path(dataset["data_dir"] or "", file).exists():
                yield f"`datasets[{index}].data_files` names {file!r}, which does not exist."


def _teacher_rules(args: Any) -> Iterator[str]:
    if args.teacher_model_name_or_path is None and getattr(args, "teacher_cache", None) is None:
        more = " or `teacher_cache: ...`" if hasattr(args, "teacher_cache") else ""
        yield f"no teacher: write `teacher_model_name_or_path: ...`{more}."


def _reward_rules(args: Any) -> Iterator[str]:
    names = args.reward_funcs or []
    yield from filter(None, map(reward_problem, names))
    if not names and not args.reward_model_name_or_path:
        yield "no reward: write `reward_funcs: [...]`."
    known = [reward_name(name) for name in names] + (args.reward_model_name_or_path or "").split("/")[-1:]
    flags = [name for entry in methods("shaper").values() for name in defaults_of(entry.method)]
    for key in ("correct_reward", *(name for name in flags if name.endswith("_reward"))):
        if isinstance(name := getattr(args, key, None), str) and name not in known:
            yield f"`{key}: {name}` is none of the reward functions, {', '.join(filter(None, known))}."


def _group_rules(args: Any) -> Iterator[str]:
    """A generation for all processes holds whole groups."""
    batch, number = args.generation_batch_size, args.num_generations
    if batch and args.steps_per_generation:
        yield "`generation_batch_size` and `steps_per_generation` say the same. Remove one."
    elif batch and number and batch % number:
        yield f"`num_generations: {number}` must divide `generation_batch_size: {batch}`, which holds whole groups."


def group_warnings(args: Any) -> Iterator[str]:
    """Yields a warning with the number of processes for which batches hold whole groups."""
    steps = args.steps_per_generation or args.gradient_accumulation_steps
    batches = []
    if not args.generation_batch_size:
        batches.append((args.num_generations, args.per_device_train_batch_size * steps, "training"))
    if args.eval_strategy != "no":
        batches.append(
            (args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size, "evaluation")
        )
    for number, batch, what in batches:
        if number and (processes := number // math.gcd(number, batch)) > 1:
            yield (
                f"groups of {number} do not fill the {batch} completions that a process generates at a time in "
                f"{what}: this will run with {processes} processes or a multiple of them, and with no other number."
            )


def training_rules(args: Any) -> Iterator[str]:
    """The fields of `training` go with every objective of `hf-rb recover`; plain fine-tuning takes those that it
    has.
    """
    defaults = {key: entry.get("default") for key, entry in schemas.load("training").items()}
    for objective in (one for one in args.objectives if one != "sft"):
        config = SimpleNamespace(**defaults | args.training | {"objective": objective, "lmbda": 0.0})
        yield from (f"`training`: {problem}" for problem in gkd_rules(config))


def upcycle_rules(args: Any) -> Iterator[str]:
    """The numbers of experts fit together."""
    if args.top_k > args.num_experts:
        yield (
            f"`top_k: {args.top_k}` is more than `num_experts: {args.num_experts}`. A token uses a part of the "
            "experts."
        )
    if args.num_experts % args.splits:
        yield (
            f"`splits: {args.splits}` must divide `num_experts: {args.num_experts}`: every split becomes as many "
            "experts."
        )


def _texts(value: Any) -> Iterator[str]:
    """The strings in a string, a list or a dict."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


TRAINED = ("sft", "gkd", "distillation", "grpo")
TRACKERS = (
    "all none azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow neptune swanlab tensorboard "
    "trackio wandb"
).split()
_COMMON: tuple[Rule, ...] = (_precision_rules, _tracker_rules, _source_rules, dataset_rules, _name_rules)
RULES: dict[str, tuple[Rule, ...]] = {
    "sft": (trainer_rules, packing_rules, graft_rules, *_COMMON),
    "gkd": (gkd_rules, packing_rules, _teacher_rules, *_COMMON),
    "distillation": (distillation_rules, _teacher_rules, *_COMMON),
    "grpo": (grpo_rules, agent_rules, _group_rules, _reward_rules, grpo_recipe_rules, *_COMMON),
    "quantize": (_text_rules, _name_rules),
    "upcycle": (upcycle_rules, _name_rules),
    "recover": (recover_rules, _text_rules, _name_rules),
}
