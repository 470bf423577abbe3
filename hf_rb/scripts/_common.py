"""Parts that the training scripts share: strict parsing, data that is checked before a model is loaded, and the end of
a run.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import torch
import trl
import yaml
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import is_torch_xla_available

from hf_rb import tiny
from hf_rb.io.data_files import BUILDERS, file_problem
from hf_rb.io.model_folder import check_model
from hf_rb.methods.recipes import KEYS, flatten
from hf_rb.methods.registry import allow
from hf_rb.ops.packing import LeakingPacking
from hf_rb.trainers.common.configs import with_flags_of
from hf_rb.trainers.common.routers import add_router_doctor
from hf_rb.trainers.common.token_samples import add_token_samples
from hf_rb.trainers.distillation.rules import only_gkd
from hf_rb.utils.devices import cpu_arguments
from hf_rb.utils.fields import documented, flag
from hf_rb.utils.renamed import former_key, nearest_key


__all__ = [
    "ScriptArguments",
    "check_output_dir",
    "columns_of",
    "load_splits",
    "make_parser",
    "make_trainer",
    "parse",
    "read",
    "readable_errors",
    "run",
]


@documented
@dataclass
class ScriptArguments(trl.ScriptArguments):
    """TRL's script arguments, and ours."""

    overwrite: bool = flag(
        False, "Whether a model and checkpoints that `output_dir` already holds are deleted when training starts."
    )
    token_samples: bool = flag(
        True,
        "Whether to write what a method does to the tokens of the first 16 sequences of the training data into "
        "`output_dir`, as text and numbers, for `hf-rb report`.",
    )
    router_doctor: str | None = flag(
        None,
        "What is logged of a mixture's routers, for `hf-rb report` and the trackers: `mean`, the mean over the "
        "layers of load, dead experts, entropies and λ, or `layers`, every layer's too.",
        choices=["mean", "layers"],
    )


def run(prepare: Callable, build: Callable, argv: Sequence[str] | None = None, name: str | None = None) -> None:
    """
    Runs a script.

    Args:
        prepare (`Callable`):
            From the arguments to what `build` takes. Everything that can be wrong before a model is loaded is found
            here.
        build (`Callable`):
            From script arguments, config, model arguments, mixture and splits to the trainer.
        argv (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.
        name (`str`, *optional*):
            The script as a program of its own, which ends with one line on stderr where `prepare` raises, where there
            is no such model or teacher, or where the first packed batch shows that a model cannot pack.
    """
    with readable_errors(name) if name else nullcontext():
        script_args, args, model_args, mixture, splits = prepare(argv)
    try:
        trainer = build(script_args, args, model_args, mixture, splits)
    except OSError:  # of a model that is nowhere, in many lines
        with readable_errors(name) if name else nullcontext():
            check_model(model_args.model_name_or_path, model_args.model_revision)
            if teacher := getattr(args, "teacher_model_name_or_path", None):
                check_model(teacher, getattr(args, "teacher_model_revision", None))
        raise
    if script_args.token_samples:
        add_token_samples(trainer)
    if script_args.router_doctor:
        add_router_doctor(trainer, per_layer=script_args.router_doctor == "layers")
    try:
        train_and_save(trainer, script_args, model_args, mixture)
    except LeakingPacking:
        if name is None:
            raise
        print(file=sys.stderr)  # the progress bar has not ended its line
        with readable_errors(name):
            raise


@contextmanager
def readable_errors(module: str) -> Generator[None]:
    """Turns an error about the user's input into one line on stderr and exit code 2. For the part before training."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{module}: error: {error}", file=sys.stderr)
        sys.exit(2)


class RecipeParser(trl.TrlParser):
    """TRL's parser, for which a scalar in a recipe is a list of one where the key takes a list, as on the command
    line.
    """

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        values = flatten(values)
        for action in self._actions:
            value = values.get(action.dest)
            is_scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
            if action.nargs == "+" and action.type in (str, int, float) and is_scalar:
                values[action.dest] = [action.type(value)]
        return super().set_defaults_with_config(**values)


def make_parser(
    config_class: type[TrainingArguments], name: str, script_arguments: type[ScriptArguments] = ScriptArguments
) -> trl.TrlParser:
    """Returns the parser of a recipe's keys, for the script of that name."""
    return RecipeParser(
        (script_arguments, config_class, trl.ModelConfig, trl.DatasetMixtureConfig),
        prog=f"python -m hf_rb.scripts.{name}",
        allow_abbrev=False,
    )


def read(parser: trl.TrlParser, argv: Sequence[str] | None = None) -> tuple:
    """
    Parses a recipe and arguments into script arguments, config, model arguments and mixture.

    Raises:
        ValueError: A key or an argument is unknown, or there is no model.
        FileExistsError: `output_dir` holds an earlier run.
    """
    script_args, args, model_args, mixture = parse(parser, argv)
    if model_args.model_name_or_path is None:
        raise ValueError("There is no model. Set `model_name_or_path` to a Hub id, a folder or `tiny:student`.")
    check_output_dir(args, script_args.overwrite)
    return script_args, args, model_args, mixture


def parse(parser: trl.TrlParser, argv: Sequence[str] | None = None) -> tuple:
    """
    Parses a recipe (`--config file.yaml`) and arguments into the parser's dataclasses.

    Raises:
        ValueError: A key or an argument is unknown; the message names the nearest known one.
    """
    argv = _allow_local_code(sys.argv[1:] if argv is None else argv)
    argv = [part for item in argv for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
    recipe: Any = {}
    path = argv[argv.index("--config") + 1] if "--config" in argv[:-1] else ""
    if path:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
        if not isinstance(recipe, dict):
            recipe = {}  # the parser refuses it
    recipe = flatten(recipe)
    parser = _with_flags_of(parser, recipe | _named_methods(argv))
    known = [field.name for dataclass_type in parser.dataclass_types for field in fields(dataclass_type) if field.init]
    _refuse_unknown(recipe, [*known, "env"], path)
    if not (torch.accelerator.is_available() or is_torch_xla_available()) and (added := _for_cpu(argv, recipe)):
        argv = [*argv, *added]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"No GPU was found: the run is on the CPU, with `{' '.join(added)}`.", file=sys.stderr)
    *parsed, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if rest:
        flags = [argument.removeprefix("--").partition("=")[0] for argument in rest if argument.startswith("--")]
        _refuse_unknown(flags or rest, known, "the command line")
    return tuple(parsed)


def _named_methods(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the methods that the command line names, by key."""
    keys = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key, kind in KEYS.items():
        keys.add_argument(f"--{key}", nargs="+" if kind == "shaper" else None, default=argparse.SUPPRESS)
    return vars(keys.parse_known_args(argv)[0])


def _with_flags_of(parser: trl.TrlParser, values: dict[str, Any]) -> trl.TrlParser:
    """Returns a parser that also knows the flags of the methods of other packages that values name."""
    types = tuple(with_flags_of(one, values) for one in parser.dataclass_types)
    if types == tuple(parser.dataclass_types):
        return parser
    return RecipeParser(types, prog=parser.prog, allow_abbrev=False)


def _allow_local_code(argv: Sequence[str]) -> list[str]:
    """Notes what the command line allows to be imported; returns the other arguments. No key of a recipe can say
    this.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow_local_code", action="append", default=[])
    known, rest = parser.parse_known_args(argv)
    allow(known.allow_local_code)
    return rest


def _for_cpu(argv: Sequence[str], recipe: dict[str, Any]) -> list[str]:
    keys = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("use_cpu", "fp16", "bf16"):
        keys.add_argument(f"--{name}", nargs="?", const=True, type=string_to_bool, default=recipe.get(name))
    return cpu_arguments(**vars(keys.parse_known_args(argv)[0]))


def _refuse_unknown(keys: Iterable[str], known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            if problem := former_key(key, known) or only_gkd(key):
                raise ValueError(f"{where}: {problem}")
            nearest = nearest_key(key, known)
            remedy = f"Did you mean `{nearest}`?" if nearest else "Remove it."
            raise ValueError(f"`{key}` in {where} is not an option. {remedy}")


T = TypeVar("T")

# What a finished run leaves in its folder.
_RUN_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
)


def check_output_dir(args: TrainingArguments, overwrite: bool) -> None:
    """
    Refuses a folder that holds an earlier run, unless this one overwrites or resumes it.

    Raises:
        FileExistsError: The folder holds a model or checkpoints.
        ValueError: Both overwriting, which deletes checkpoints, and resuming are asked for.
    """
    resume = _resume_from(args)
    if overwrite and resume:
        raise ValueError(
            "`--overwrite` deletes the checkpoints that `--resume_from_checkpoint` would continue from. Pass one of "
            "the two."
        )
    folder = Path(cast(str, args.output_dir))
    found = [
        path.name
        for pattern in ("config.json", "adapter_config.json", "checkpoint-*")
        for path in folder.glob(pattern)
    ]
    if found and not overwrite and not resume:
        raise FileExistsError(
            f"`output_dir: {args.output_dir}` already holds a model or checkpoints of one ({found[0]}). Choose "
            "another folder, pass `--resume_from_checkpoint true` to continue that run, or `--overwrite` to replace "
            "it."
        )


def _resume_from(args: TrainingArguments) -> str | bool | None:
    # A command line gives strings.
    named = {"true": True, "false": None}
    return named.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)


def _remove_earlier_run(args: Any) -> None:
    if args.should_save:
        for pattern in (*_RUN_FILES, "completions/*.parquet"):
            for path in Path(args.output_dir).glob(pattern):
                path.unlink()
        for path in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(path)
    args.distributed_state.wait_for_everyone()


def load_splits(
    script_args: ScriptArguments, args: TrainingArguments, mixture: trl.DatasetMixtureConfig
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset | datasets.IterableDataset | None]:
    """
    Loads the training split and, if there is evaluation, the test split of what a recipe names as `dataset_name` or
    `datasets`.

    Raises:
        ValueError: No dataset, or a split that it does not have.
        OSError: The dataset cannot be found.
    """
    evaluation = args.eval_strategy != "no"
    names = [script_args.dataset_train_split] + ([script_args.dataset_test_split] if evaluation else [])
    if mixture.datasets:
        _check_files(mixture)
        splits = trl.get_dataset(mixture)
    elif script_args.dataset_name is None:
        raise ValueError("There is no dataset. Set `dataset_name`, or `datasets` for a mixture or local files.")
    elif script_args.dataset_name.startswith("tiny:"):
        name, config = script_args.dataset_name.removeprefix("tiny:"), script_args.dataset_config or "messages"
        splits = {split: tiny.load_dataset(name, config=config, split=split) for split in names}
    elif problem := file_problem(script_args.dataset_name):
        raise ValueError(problem)
    else:
        splits = datasets.load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    for name in names:
        if name not in splits:
            raise ValueError(
                f"The dataset has no split {name!r}, only {', '.join(map(repr, splits))}. Set `dataset_train_split` "
                "and `dataset_test_split`, `test_split_size` for a mixture, or `eval_strategy: no`."
            )
    return splits[names[0]], splits[names[1]] if evaluation else None


def _check_files(mixture: trl.DatasetMixtureConfig) -> None:
    for entry in mixture.datasets:
        files = entry.data_files or []
        files = files.values() if isinstance(files, dict) else [files] if isinstance(files, str) else files
        for file in files:
            is_local = entry.path in BUILDERS.values() and "://" not in file and not set(file) & set("*?[")
            if is_local and not Path(entry.data_dir or "", file).exists():
                raise FileNotFoundError(f"`datasets` names the file {file}, which does not exist in {Path.cwd()}.")


def columns_of(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Returns the column names, of a streamed dataset those of its first row."""
    return list(dataset.column_names or next(iter(dataset)))


def make_trainer(
    trainer_class: Callable[..., T], args: Any, model_args: trl.ModelConfig, splits: Sequence, **kwargs: Any
) -> T:
    """Loads the models and returns the trainer; `kwargs` are further arguments of its constructor."""
    args.model_init_kwargs = _model_init_kwargs(model_args, args)
    return trainer_class(
        tiny.resolve(cast(str, model_args.model_name_or_path)),
        args=args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
        **kwargs,
    )


def _model_init_kwargs(model_args: trl.ModelConfig, args: Any) -> dict[str, Any]:
    """Returns what `from_pretrained` gets: the model arguments, and over them `model_init_kwargs` of the recipe."""
    chosen = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return {key: value for key, value in chosen.items() if value is not None} | (args.model_init_kwargs or {})


def train_and_save(
    trainer: Any, script_args: ScriptArguments, model_args: trl.ModelConfig, mixture: trl.DatasetMixtureConfig
) -> None:
    """Trains, evaluates if there is data for it, saves the model with its metrics and card, and pushes if asked to."""
    args = trainer.args
    if script_args.overwrite:
        _remove_earlier_run(args)
    result = trainer.train(resume_from_checkpoint=_resume_from(args))
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {"step": None})
        is_current = last["step"] == trainer.state.global_step
        trainer.save_metrics("eval", last if is_current else trainer.evaluate())
    trainer.save_state()
    trainer.save_model(args.output_dir)
    card = {"dataset_name": _dataset_name(script_args, mixture), "base_model": model_args.model_name_or_path}
    trainer.create_model_card(**card)
    trainer.accelerator.print(f"The model is in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.end()


def _dataset_name(script_args: ScriptArguments, mixture: trl.DatasetMixtureConfig) -> str | None:
    if not mixture.datasets:
        return script_args.dataset_name
    names = [entry.data_files if isinstance(entry.data_files, str) else entry.path for entry in mixture.datasets]
    return names[0] if len(names) == 1 else None
