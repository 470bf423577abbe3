"""`hf-rb check`: everything wrong with a recipe that can be known without loading anything, in one pass.

Keys, types, choices and ranges come from the schemas, and combinations from the rules that the configs themselves run.
What a recipe is for follows from its keys: it is for the verb that knows the most of them, the first in
`schemas.RECIPES` where two know equally many; `--for` says it outright.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from hf_rb.cli import schemas
from hf_rb.cli.check.findings import Findings
from hf_rb.cli.check.fix import fix
from hf_rb.cli.check.plan import make_plan, recover_lines
from hf_rb.cli.check.recipe import add_local_code, read_overrides, read_recipe
from hf_rb.cli.check.rules import RULES, TRAINED, group_warnings, training_rules, upcycle_rules
from hf_rb.cli.check.values import ValueChecker
from hf_rb.cli.schemas.libraries import class_fields
from hf_rb.io.data_files import column_rules
from hf_rb.io.resources import find_recipe
from hf_rb.methods.recipes import flatten, foreign
from hf_rb.methods.registry import allow
from hf_rb.trainers.grpo.rules import grpo_warnings, pipeline_line
from hf_rb.utils.output import json_text


__all__ = ["Findings", "add_local_code", "check", "read_overrides", "read_recipe", "upcycle_rules"]

EXAMPLE = "hf-rb check profit/tiny-cpu"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="a YAML file, or the name of a recipe of hf_rb")
    parser.add_argument(
        "--for", dest="target", choices=[*schemas.RECIPES], help="the verb to check for (default: by the keys)"
    )
    add_local_code(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="first rewrite keys that older versions had: new names, and comments where a key is gone",
    )


def run(args: argparse.Namespace) -> int:
    allow(args.allow_local_code)
    for path in map(find_recipe, args.recipes if args.fix else ()):
        recipe = read_recipe(path)
        text, changes = fix(path.read_text(encoding="utf-8"), recipe, schemas.load(args.target or _verb_of(recipe)))
        if changes:
            path.write_text(text, encoding="utf-8")
        for change in changes:
            print(f"{path}: {change}", file=sys.stderr)
    found = [check(path, read_recipe(path), args.target) for path in map(find_recipe, args.recipes)]
    if args.json:
        print(json_text([findings.as_dict() for findings in found]))
    else:
        for findings in found:
            findings.show()
    return 2 if any(findings.errors for findings in found) else 0


def check(path: Path, recipe: dict[str, Any], verb: str | None = None) -> Findings:
    """Checks the values of a recipe.

    Args:
        path (`Path`): Where the recipe came from, for the messages.
        recipe (`dict`): Key to value, as YAML gives them; strings are converted as the command line's parser does.
        verb (`str`, *optional*): What the recipe is for, one of `schemas.RECIPES`; by default it follows from the
            keys.
    """
    recipe = {key: value for key, value in recipe.items() if key != "env"}
    verb = verb or _verb_of(recipe)
    findings = Findings(str(path), verb)
    known = _known(recipe, verb)
    if 2 * known < len(recipe) and 2 * known < _known(recipe, likely := _verb_of(recipe)):
        # One line, in place of one for every key.
        findings.errors.append(f"this is a recipe for `hf-rb {likely}`, not for `hf-rb {verb}`.")
        return findings
    try:
        recipe = flatten(recipe)
    except ValueError as error:
        findings.errors.append(str(error))
        return findings
    keys = schemas.load(verb)
    for entry in foreign(recipe, keys):  # methods of other packages
        flags = cast(type, entry.method.flags)
        keys = keys | class_fields(f"{flags.__module__}:{flags.__qualname__}")
    values = ValueChecker(findings).values(recipe, keys)
    try:
        _apply_rules(findings, SimpleNamespace(**values))
    except AttributeError as error:
        if not isinstance(error.obj, SimpleNamespace):
            raise
        findings.errors.append(
            f"hf_rb reads the key `{error.name}`, which the installed TRL or transformers does not have any more: "
            "`pip install hf_rb` brings versions that it works with."
        )
    return findings


def _apply_rules(findings: Findings, args: Any) -> None:
    """Adds what is wrong with the values together, and what a good recipe will do."""
    verb = findings.verb
    for rule in RULES[verb]:
        findings.errors += rule(args)
    if verb in TRAINED:
        findings.errors += column_rules(args, verb)
    if verb == "grpo" and not findings.errors:
        findings.warnings += [*grpo_warnings(args), *group_warnings(args)]
        findings.notes.append(pipeline_line(args))
    if verb == "recover" and not findings.errors:
        findings.errors += dict.fromkeys(training_rules(args))
        findings.notes += recover_lines(args) if not findings.errors else ()
    if verb in TRAINED and not findings.errors:
        _plan(findings, args)


def _verb_of(recipe: dict[str, Any]) -> str:
    """Returns the verb that knows the most keys of a recipe. Keys of verbs behind one that knows all are not read."""
    known = {}
    for verb in schemas.RECIPES:
        known[verb] = _known(recipe, verb)
        if known[verb] == len(recipe):
            break
    return max(known, key=known.__getitem__)


def _known(recipe: dict[str, Any], verb: str) -> int:
    return len(recipe.keys() & schemas.load(verb).keys())


def _plan(findings: Findings, args: Any) -> None:
    try:
        findings.plan = make_plan(args, findings.verb)
    except ValueError as error:
        findings.warnings.append(f"memory cannot be estimated: {error}")
    else:
        findings.warnings += findings.plan.problems()
