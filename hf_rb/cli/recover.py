"""`hf-rb recover`: quantizes a model and wins back what that has cost, in stages of which each is done once."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hf_rb.cli import schemas
from hf_rb.cli.check import check, read_overrides, read_recipe
from hf_rb.io.model_folder import check_models
from hf_rb.io.resources import find_recipe
from hf_rb.utils.output import json_text


EXAMPLE = "hf-rb recover recover/tiny-cpu --output_dir outputs/recovered --objectives forward_kl sft"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe of hf_rb")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument_group("keys, in the recipe or as `--key value`", schemas.listing("recover"))
    parser.set_defaults(overrides=[])
    parser.usage = f"{parser.prog} RECIPE [--json] [--key value ...]"


def run(args: argparse.Namespace) -> int:
    from hf_rb.recover.config import RecoverConfig

    path = find_recipe(args.recipe)
    overrides = read_overrides(args.overrides, "recover")
    recipe = read_recipe(path) | {key: _from_text(value) for key, value in overrides.items()}
    found = check(path, recipe, "recover")
    if found.errors:
        found.show()
        return 2
    config = RecoverConfig(**recipe)
    check_models(recipe)

    from hf_rb.recover import recover

    with redirect_stdout(sys.stderr):  # the trainers print what they log
        report = recover(config, lambda line: print(line, flush=True))
    if args.json:
        print(json_text(report.to_dict()))
    else:
        model = Path(config.output_dir, "model")
        where = f"The model is in {model}, and its card says how to load it." if model.is_dir() else ""
        if report.begins_with:
            print(f"Perplexity on {report.text}: each window begins with {report.begins_with}.\n")
        if report.rounding_seconds is not None:
            where = f"4-bit rounding was measured in {report.rounding_seconds:.1f} s. {where}"
        print("\n".join([report.table(), "", *report.sentences(), where]).rstrip())
    return 0


def _from_text(value: Any) -> Any:
    """Reads an argument as YAML does."""
    import yaml

    if isinstance(value, list):
        return [_from_text(one) for one in value]
    try:
        return yaml.safe_load(str(value))
    except yaml.YAMLError as error:
        raise ValueError(f"{value!r} is not valid YAML: {error}") from error
