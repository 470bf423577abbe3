"""A recipe's keys and values, from its file and from the command line."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_rb.cli import schemas


__all__ = ["add_local_code", "read_overrides", "read_recipe"]


def add_local_code(parser: argparse.ArgumentParser) -> None:
    """Adds the option that allows code to be imported which a recipe names."""
    parser.add_argument(
        "--allow_local_code",
        action="append",
        default=[],
        metavar="MODULE:ATTRIBUTE",
        help="an objective, a shaper or a reward function of your own that the recipe names and that may be imported",
    )


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
    seen: set[str | None] = set()
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
    keys = schemas.load(verb)
    values: dict[str, Any] = {}
    key = ""
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
