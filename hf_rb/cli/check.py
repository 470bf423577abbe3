"""`hf-rb check`: everything wrong with a recipe that can be known without loading anything, in one pass.

Keys, types, choices and ranges come from the schemas, and combinations from the rules that the configs themselves run. What
a recipe is for follows from its keys: it is for the verb that knows the most of them, the first in `schemas.RECIPES` where
two know equally many; `--for` says it outright.
"""

import argparse
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_rb import tiny
from hf_rb.cli import schemas
from hf_rb.cli.fix import fix
from hf_rb.cli.plan import Plan, make_plan, recover_lines
from hf_rb.io.data_files import column_rules, dataset_rules, file_problem, text_problem
from hf_rb.io.resources import find_recipe, recipe_names
from hf_rb.methods.registry import LOCAL, pipeline_line
from hf_rb.quantizers.rules import d2quant_rules, ptqtp_rules
from hf_rb.recover.config import recover_rules
from hf_rb.rl.rewards import reward_name, reward_problem
from hf_rb.trainers.common.rules import packing_rules
from hf_rb.trainers.distillation.rules import distillation_rules, only_gkd
from hf_rb.trainers.gkd.rules import gkd_rules
from hf_rb.trainers.grpo.rules import agent_rules, grpo_rules, grpo_warnings
from hf_rb.trainers.sft.rules import profit_rules
from hf_rb.utils.fields import Rule, value_problem
from hf_rb.utils.output import json_text
from hf_rb.utils.renamed import former_key, nearest_key
from hf_rb.weights.rules import graft_rules


__all__ = ["Report", "check", "read_overrides", "read_recipe", "upcycle_rules"]

EXAMPLE = "hf-rb check profit/tiny-cpu"


@dataclass
class Report:
    """What is wrong with a recipe.

    Attributes:
        recipe (`str`): The recipe's path.
        verb (`str`): The verb it was checked for.
        errors (`list[str]`): Messages about what would stop the run.
        warnings (`list[str]`): Messages about what could not be decided, or may not be what one thinks.
        notes (`list[str]`): What the recipe does.
        plan ([`~hf_rb.cli.plan.Plan`], *optional*): Device, steps, tokens and memory of a good recipe for training.
    """

    recipe: str
    verb: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"plan": self.plan and self.plan.as_dict()}

    def show(self) -> None:
        """Prints the findings to stderr, or one line to stdout when there are none."""
        for kind, messages in (("error", self.errors), ("warning", self.warnings)):
            for message in messages:
                print(f"{self.recipe}: {kind}: {message}", file=sys.stderr)
        if not self.errors:
            print(f"{self.recipe}: a good recipe for `hf-rb {self.verb}`.")
            for note in [*self.notes, *(self.plan.lines() if self.plan else ())]:
                print(f"{self.recipe}: {note}")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="a YAML file, or the name of a recipe of hf_rb")
    parser.add_argument(
        "--for", dest="target", choices=[*schemas.RECIPES], help="the verb to check for (default: by the keys)"
    )
    parser.add_argument(
        "--allow_local_code",
        action="append",
        default=[],
        metavar="MODULE:ATTRIBUTE",
        help="code that a recipe for `hf-rb grpo` names (nothing is imported)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="first rewrite keys that older versions had: new names, and comments where a key is gone",
    )


def run(args: argparse.Namespace) -> int:
    LOCAL.update(args.allow_local_code)
    for path in map(find_recipe, args.recipes if args.fix else ()):
        recipe = read_recipe(path)
        text, changes = fix(
            path.read_text(encoding="utf-8"), recipe, schemas.load(args.target or _verb_of(recipe))["keys"]
        )
        if changes:
            path.write_text(text, encoding="utf-8")
        for change in changes:
            print(f"{path}: {change}", file=sys.stderr)
    reports = [check(path, read_recipe(path), args.target) for path in map(find_recipe, args.recipes)]
    if args.json:
        print(json_text([report.as_dict() for report in reports]))
    else:
        for report in reports:
            report.show()
    return 2 if any(report.errors for report in reports) else 0


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe.

    Raises:
        ValueError: The file is no YAML mapping, or gives a key twice, of which YAML would keep the last.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        for key in _repeated_keys(yaml.compose(text, yaml.SafeLoader)):
            raise ValueError(f"{path} gives `{key.value}` twice, again in line {key.start_mark.line + 1}.")
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got {type(recipe).__name__}.")
    return recipe


def _repeated_keys(node: Any) -> Iterator[Any]:
    """The nodes of a YAML tree that repeat a key of their mapping."""
    children = node.value if node and not isinstance(node.value, str) else ()
    seen = set()
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        if key and str(key.value) in seen:
            yield key
        seen.add(key and str(key.value))
        yield from _repeated_keys(value)


def read_overrides(arguments: Iterable[str], verb: str) -> dict[str, Any]:
    """Reads `--key value` arguments as the parser of the verb's script does.

    Raises:
        ValueError: An argument that belongs to no key.
    """
    keys = schemas.load(verb)["keys"]
    values: dict[str, Any] = {}
    for argument in _split_at_equals(arguments):
        if argument.startswith("--"):
            key = argument[2:].replace("-", "_")
            negated = key not in keys and key.startswith("no_") and key[3:] in keys
            key = key[3:] if negated else key
            values[key] = not negated
        elif not values:
            raise ValueError(f"unexpected argument {argument!r}: arguments after the recipe are `--key value`.")
        elif isinstance(values[key], bool):
            takes_list = any(kind.startswith("list") for kind in keys.get(key, {"types": ()})["types"])
            values[key] = [argument] if takes_list else argument
        else:
            values[key] = [*values[key], argument] if isinstance(values[key], list) else [values[key], argument]
    return values


def _split_at_equals(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        yield from argument.split("=", 1) if argument.startswith("--") else (argument,)


def check(path: Path, recipe: dict[str, Any], verb: str | None = None) -> Report:
    """Checks the values of a recipe.

    Args:
        path (`Path`): Where the recipe came from, for the messages.
        recipe (`dict`): Key to value, as YAML gives them; strings are converted as the command line's parser does.
        verb (`str`, *optional*): What the recipe is for, one of `schemas.RECIPES`; by default it follows from the keys.
    """
    recipe = {key: value for key, value in recipe.items() if key != "env"}
    likely = _verb_of(recipe)
    verb = verb or likely
    schema = schemas.load(verb)
    report = Report(str(path), verb)
    if 2 * _known(recipe, verb) < _known(recipe, likely):  # one line, in place of one for every key
        report.errors.append(f"this is a recipe for `hf-rb {likely}`, not for `hf-rb {verb}`.")
        return report
    values = _Checker(report, schema["versions"]).values(recipe, schema["keys"])
    args = SimpleNamespace(**values)
    for rule in RULES[verb]:
        report.errors += rule(args)
    if verb in TRAINED:
        report.errors += column_rules(args, verb)
    if verb == "grpo" and not report.errors:
        report.warnings += [*grpo_warnings(args), *_group_warnings(args)]
        report.notes.append(pipeline_line(args))
    if verb == "recover" and not report.errors:
        report.errors += dict.fromkeys(_training_rules(args))
        report.notes += recover_lines(args) if not report.errors else ()
    if verb in TRAINED and not report.errors:
        _plan(report, args)
    return report


def _verb_of(recipe: dict[str, Any]) -> str:
    """Returns the verb that knows the most keys of a recipe."""
    return max(schemas.RECIPES, key=lambda verb: _known(recipe, verb))


def _known(recipe: dict[str, Any], verb: str) -> int:
    return len(recipe.keys() & schemas.load(verb)["keys"].keys())


def _plan(report: Report, args: Any) -> None:
    try:
        report.plan = make_plan(args, report.verb)
    except ValueError as error:
        report.warnings.append(f"memory cannot be estimated: {error}")
    else:
        report.warnings += report.plan.problems()


class _Checker:
    """Compares values with the keys of a schema and writes what is wrong into a report."""

    def __init__(self, report: Report, versions: dict[str, str]):
        self.report = report
        # An installed minor other than the schema's may have other keys.
        self.moved = [
            f"{library} {metadata.version(library)} is installed, the schema is of {minor}"
            for library, minor in versions.items()
            if not metadata.version(library).startswith(f"{minor}.")
        ]

    def values(
        self, given: dict[str, Any], keys: dict[str, dict], prefix: str = "", from_text: bool = True
    ) -> dict[str, Any]:
        """Returns the good ones of the given values over the defaults, so that the rules can run in any case."""
        values = {key: entry.get("default") for key, entry in keys.items()}
        for key, value in given.items():
            if key not in keys:
                self._unknown(key, keys, prefix)
                continue
            try:
                values[key] = self._value(prefix + key, value, keys[key], from_text)
            except ValueError as error:
                self.report.errors.append(str(error))
        for key, entry in keys.items():
            if "default" not in entry and key not in given:
                self.report.errors.append(f"`{prefix}{key}` is missing.")
        return values

    def _unknown(self, key: Any, keys: Collection[str], prefix: str) -> None:
        problem = former_key(key, keys, prefix) or (None if prefix else only_gkd(key))
        if problem:
            self.report.errors.append(problem)
            return
        methods = [name for name in schemas.QUANTIZATION if key in schemas.load(name)["keys"]]
        if methods and prefix.endswith("quantization_config."):
            instead = _COUNTERPARTS.get(key)
            hint = f"; this method has `{instead}` (`--{instead.replace('_', '-')}`)." if instead else "."
            self.report.errors.append(
                f"`{prefix}{key}` is of `quant_method: {methods[0]}` (`--method {methods[0]}`){hint}"
            )
            return
        close = nearest_key(key, keys)
        message = f"unknown key `{prefix}{key}`" + (f"; did you mean `{prefix}{close}`?" if close else ".")
        owners = [] if prefix else [f"`hf-rb {verb}`" for verb in schemas.RECIPES if key in schemas.load(verb)["keys"]]
        if owners:
            self.report.errors.append(
                f"`{key}` is a key of {' and '.join(owners)}, and this recipe is for `hf-rb {self.report.verb}`. Remove it, or use "
                "that verb."
            )
        elif self.moved:
            self.report.warnings.append(f"{message} It may be new: {', '.join(self.moved)}.")
        else:
            self.report.errors.append(message)

    def _value(self, key: str, value: Any, entry: dict[str, Any], from_text: bool) -> Any:
        # The parser of the training scripts takes a scalar for a list of one.
        if from_text and self.report.verb in TRAINED and _is_one_of_a_list(value, entry["types"]):
            value = value if "str" in entry["types"] else [value]
        value = _convert(key, value, entry["types"], from_text)
        problem = value_problem(key, value, choices=entry.get("choices"), range=entry.get("range"))
        if problem:
            raise ValueError(problem)
        if "keys" in entry:
            value = [self.values(item, entry["keys"], f"{key}[{index}].") for index, item in enumerate(value)]
        if key == "quantization_config":
            self._quantization(key, {"quant_method": "ptqtp"} | value)  # the default of `hf-rb quantize`
        elif key == "training":  # of `hf-rb recover`
            self.values(value, schemas.load("training")["keys"], "training.", from_text=False)
        elif isinstance(value, dict):
            self._quantization(f"{key}.quantization_config", value.get("quantization_config"))
        return value

    def _quantization(self, key: str, config: Any) -> None:
        """Checks a quantization config, if it is one of ours. It reaches its class as YAML gives it: no text is converted."""
        method = config.get("quant_method") if isinstance(config, dict) else None
        if method in [*schemas.QUANTIZATION]:  # compared, not hashed: it may be anything
            before = len(self.report.errors)
            values = self.values(config, schemas.load(method)["keys"], f"{key}.", from_text=False)
            rules = QUANTIZATION_RULES[method](SimpleNamespace(**values))
            if len(self.report.errors) == before:  # otherwise the rules would speak of defaults that nobody wrote
                self.report.errors += [f"`{key}`: {problem}" for problem in rules]
        elif key == "quantization_config" and isinstance(config, dict):
            problem = value_problem(f"{key}.quant_method", str(method), choices=[*schemas.QUANTIZATION])
            self.report.errors.append(problem)
        # Elsewhere it may be a method of another library; "quanto" is further away than this.
        elif close := get_close_matches(str(method), schemas.QUANTIZATION, n=1, cutoff=0.8):
            self.report.warnings.append(f"`{key}.quant_method` is {method!r}; did you mean {close[0]!r}?")


# Keys of quantization methods with the same meaning, each for the other.
_COUNTERPARTS = {
    "bits": "planes",
    "bits_per_layer": "planes_per_layer",
    "planes": "bits",
    "planes_per_layer": "bits_per_layer",
}
_PYTHON = {
    "null": type(None),
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "dict": dict,
    "any": object,
}


def _convert(key: str, value: Any, types: list[str], from_text: bool) -> Any:
    for kind in types:
        if _is(value, kind):
            return value
    if isinstance(value, str) and from_text:
        for kind in types:
            try:
                return _FROM_TEXT[kind](value)
            except (KeyError, ValueError):
                continue
    expected, hint = " or ".join(types), ""
    if isinstance(value, bool):
        hint = " YAML reads no, off, yes and on as booleans: write it in quotes."
    elif _is_one_of_a_list(value, types):
        hint = f" Write `{key}: [{value}]`."
    elif isinstance(value, str) and "float" in types:
        hint = " Write a number without quotes; YAML reads one such as 1e-4 as text, and 1.0e-4 as a number."
    raise ValueError(f"`{key}` must be {expected}; got {value!r} ({type(value).__name__}).{hint}")


def _is_one_of_a_list(value: Any, types: list[str]) -> bool:
    return any(kind.startswith("list") and _is([value], kind) for kind in types)


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("list"):
        return isinstance(value, list) and all(_is(item, kind[5:-1]) for item in value)
    if isinstance(value, bool):
        return kind in ("bool", "any")
    return isinstance(value, _PYTHON[kind])


_YES_NO = {word: word in ("yes", "true", "t", "y", "1") for word in "yes true t y 1 no false f n 0".split()}
_FROM_TEXT = {
    "int": int,
    "float": float,
    "bool": lambda text: _YES_NO[text.lower()],
    "null": lambda text: {"none": None, "null": None}[text.lower()],
}


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


def _calibration_rules(config: Any) -> Iterator[str]:
    # Only here: a saved model keeps the name of a text that need not be where it is loaded.
    yield from d2quant_rules(config)
    if isinstance(config.dataset, str) and config.backend != "rtn":
        yield from filter(None, [text_problem("dataset", config.dataset)])


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
    for key in ("correct_reward", "edas_format_reward"):
        if (name := getattr(args, key)) is not None and name not in known:
            yield f"`{key}: {name}` is none of the reward functions, {', '.join(filter(None, known))}."


def _group_rules(args: Any) -> Iterator[str]:
    """A generation for all processes holds whole groups."""
    batch, number = args.generation_batch_size, args.num_generations
    if batch and args.steps_per_generation:
        yield "`generation_batch_size` and `steps_per_generation` say the same. Remove one."
    elif batch and number and batch % number:
        yield f"`num_generations: {number}` must divide `generation_batch_size: {batch}`, which holds whole groups."


def _group_warnings(args: Any) -> Iterator[str]:
    """How many processes it takes for batches to hold whole groups."""
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
                f"groups of {number} do not fill the {batch} completions that a process generates at a time in {what}: this will run "
                f"with {processes} processes or a multiple of them, and with no other number."
            )


def _shaper_rules(args: Any) -> Iterator[str]:
    """What a trainer takes as an object too, and a recipe can only name."""
    if "srar" in args.advantage_shapers and args.srar_judge is None:
        yield "`advantage_shapers: [srar]` needs a judge of steps: write `srar_judge: ...`, the URL of an endpoint or `tiny`."
    if "srar" in args.advantage_shapers and args.srar_only_mixed and args.correct_reward is None:
        yield (
            "`advantage_shapers: [srar]` judges groups with correct and wrong completions. Set `correct_reward`, or `srar_only_mixed: "
            "false`."
        )
    if (
        "calibadv" in args.advantage_shapers
        and args.calibadv_soft
        and not (args.environment or args.calibadv_step_field)
    ):
        yield (
            "`advantage_shapers: [calibadv]` reads what tools return, and there are none: write `environment: search`, or "
            "`calibadv_soft: false` to balance answers only."
        )


def _training_rules(args: Any) -> Iterator[str]:
    """The fields of `training` go with every objective of `hf-rb recover`; plain fine-tuning takes those that it has."""
    defaults = {key: entry.get("default") for key, entry in schemas.load("training")["keys"].items()}
    for objective in (one for one in args.objectives if one != "sft"):
        config = SimpleNamespace(**defaults | args.training | {"objective": objective, "lmbda": 0.0})
        yield from (f"`training`: {problem}" for problem in gkd_rules(config))


def upcycle_rules(args: Any) -> Iterator[str]:
    """The numbers of experts fit together."""
    if args.top_k > args.num_experts:
        yield f"`top_k: {args.top_k}` is more than `num_experts: {args.num_experts}`. A token uses a part of the experts."
    if args.num_experts % args.splits:
        yield f"`splits: {args.splits}` must divide `num_experts: {args.num_experts}`: every split becomes as many experts."


def _texts(value: Any) -> Iterator[str]:
    """The strings in a string, a list or a dict."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


TRAINED = ("sft", "gkd", "distillation", "grpo")
TRACKERS = (
    "all none azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow neptune swanlab tensorboard trackio wandb"
).split()
_COMMON: tuple[Rule, ...] = (_precision_rules, _tracker_rules, _source_rules, dataset_rules, _name_rules)
QUANTIZATION_RULES: dict[str, Rule] = {"d2quant": _calibration_rules, "ptqtp": ptqtp_rules}
RULES: dict[str, tuple[Rule, ...]] = {
    "sft": (profit_rules, packing_rules, graft_rules, *_COMMON),
    "gkd": (gkd_rules, packing_rules, _teacher_rules, *_COMMON),
    "distillation": (distillation_rules, _teacher_rules, *_COMMON),
    "grpo": (grpo_rules, agent_rules, _group_rules, _reward_rules, _shaper_rules, *_COMMON),
    "quantize": (_text_rules, _name_rules),
    "upcycle": (upcycle_rules, _name_rules),
    "recover": (recover_rules, _text_rules, _name_rules),
}
