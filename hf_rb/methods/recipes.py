"""Methods in a recipe: names, or names with flags, `advantage_shapers: [edas, {brevity: {alpha: 0.3}}]`.

Parsers take names and flat flags (`brevity_alpha`), so the second form becomes the first before they see it. Standard
library only.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from hf_rb.methods.record import Kind
from hf_rb.methods.registry import PACKAGE, Entry, find, methods
from hf_rb.methods.rules import defaults_of


__all__ = ["KEYS", "flatten", "foreign"]

KEYS: dict[str, Kind] = {"objective": "objective", "advantage_shapers": "shaper"}
"""Keys of a recipe that name methods."""


def flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """
    Returns a recipe whose keys of methods hold names, and whose flags of methods are keys.

    Raises:
        ValueError: A mapping does not name one method with its flags, has a flag that the method has not, or one that
            the recipe gives as a key too.
    """
    flat = dict(recipe)
    for key, kind in KEYS.items():
        given = recipe.get(key)
        items = given if isinstance(given, list) else [given]
        if not any(isinstance(item, Mapping) for item in items):
            continue
        names = []
        for item in items:
            name, flags = item, {}
            if isinstance(item, Mapping):
                if len(item) != 1 or not isinstance(next(iter(item.values())), Mapping | None):
                    raise ValueError(f"`{key}: {item}` must be a name, or a name with flags: `{{name: {{flag: 1}}}}`.")
                [(name, flags)] = item.items()
            names.append(name)
            for flag, value in (flags or {}).items():
                field = _field(key, kind, str(name), str(flag))
                if field in recipe:
                    raise ValueError(
                        f"`{field}` is given twice, as a key and under `{key}: {{{name}: ...}}`. Remove one."
                    )
                flat[field] = value
        flat[key] = names if isinstance(given, list) else names[0]
    return flat


def _field(key: str, kind: Kind, name: str, flag: str) -> str:
    """Returns the field of a flag that a recipe writes under a method."""
    entry = find(kind, name, key)
    known = [*defaults_of(entry.method), *getattr(entry.method, "own", ())]
    for field in (f"{entry.method.key}_{flag}", flag):
        if field in known:
            return field
    flags = [field.removeprefix(f"{entry.method.key}_") for field in known]
    close = get_close_matches(flag, flags, n=1)
    hint = f"Did you mean `{close[0]}`?" if close else f"Its flags are {', '.join(flags) or 'none'}."
    raise ValueError(f"`{key}: {{{name}: {{{flag}: ...}}}}`: {name} has no flag `{flag}`. {hint}")


def foreign(values: Mapping[str, Any], fields: Collection[str]) -> list[Entry]:
    """Returns the methods of other packages that flat values name and whose flags are not among the fields of a
    config.
    """
    found = {}
    for key, kind in KEYS.items():
        names = values.get(key)
        for name in names if isinstance(names, list) else [names]:
            entry = methods(kind).get(name) if isinstance(name, str) else None
            if entry and entry.package != PACKAGE and not defaults_of(entry.method).keys() <= {*fields}:
                found[entry.method.key] = entry
    return [*found.values()]
