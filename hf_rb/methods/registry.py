"""Registry of the methods: files of this package, entry points of installed packages, and code that the command line
allows. Standard library only: nothing is imported until a method is used.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, cast

from hf_rb.methods import static
from hf_rb.methods.record import (
    Kind,
    MergeMethod,
    Method,
    ModelMethod,
    ObjectiveMethod,
    QuantizerMethod,
    ShaperMethod,
)
from hf_rb.utils.fields import value_problem


__all__ = [
    "GROUPS",
    "LOCAL",
    "PACKAGE",
    "Entry",
    "allow",
    "broken",
    "catalog",
    "entries",
    "find",
    "methods",
    "name_problem",
]

GROUPS: dict[Kind, str] = {
    "objective": "hf_rb.objectives",
    "shaper": "hf_rb.shapers",
    "quantizer": "hf_rb.quantizers",
    "merge": "hf_rb.merges",
}
"""Entry-point groups by kind of method, in which another package registers `key = "module:Class"`."""

LOCAL: set[str] = set()
"""Code that the command line allows to be imported, `module:attribute`: its own name in a recipe."""


PACKAGE = "hf_rb"
_FOLDERS = ("objectives", "advantages", "quantizers", "weights", "models", "recover")
_CLASSES: dict[Kind, type[Method]] = {
    "trainer": Method,
    "objective": ObjectiveMethod,
    "shaper": ShaperMethod,
    "quantizer": QuantizerMethod,
    "merge": MergeMethod,
    "model": ModelMethod,
}


def allow(names: Iterable[str]) -> None:
    """
    Allows code to be imported that a recipe names.

    Raises:
        ValueError: A name is not of the form `module:attribute`.
    """
    for name in names:
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise ValueError(f"`--allow_local_code {name}` is not of the form `module:attribute`.")
        LOCAL.add(name)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())


@dataclass(frozen=True)
class Entry:
    """
    Place of a method.

    Attributes:
        method (`Method`): Its record, of the class of its kind.
        module, name (`str`): Where the class stands, or the constant that holds the record.
        package (`str`): The package it comes with.
    """

    method: Any
    module: str
    name: str
    package: str

    def load(self) -> Any:
        """Imports the class."""
        return getattr(import_module(self.module), self.name)


def entries() -> list[Entry]:
    """Returns all methods that can be used, by kind, in the order of their files."""
    return [*{entry.method.key: entry for kind in _CLASSES for entry in methods(kind).values()}.values()]


def catalog() -> dict[str, Method]:
    """Returns the records of all methods that can be used, by key."""
    return {entry.method.key: entry.method for entry in entries()}


def methods(kind: Kind) -> dict[str, Entry]:
    """
    Returns the methods of a kind by name: a key, or `module:attribute` of allowed code.

    A method of another package that is broken is left out; [`broken`] says what is wrong with it.
    """
    found, _ = _installed(kind)
    return found | {name: _local(kind, name) for name in sorted(LOCAL) if _is_local(kind, name)}


def broken(kind: Kind) -> dict[str, str]:
    """Returns what is wrong with the methods of other packages that cannot be used, by name."""
    return _installed(kind)[1]


def find(kind: Kind, name: str, key: str | None = None) -> Entry:
    """
    Returns a method by its name, which the key of a recipe has given.

    Raises:
        ValueError: There is none; the message names the nearest, or says what is wrong with it.
    """
    problem = name_problem(kind, name, key)
    if problem:
        raise ValueError(problem)
    return methods(kind)[name]


def name_problem(kind: Kind, name: str, key: str | None = None) -> str | None:
    """Returns what is wrong with the name of a method, if anything; `key` is the key of the recipe that has it."""
    known = methods(kind)
    if name in known:
        return None
    if name in broken(kind):
        return broken(kind)[name]
    key = key or kind
    if name in LOCAL:
        try:
            _local(kind, name)
        except Exception as error:  # whatever stands in a user's file
            return f"`{key}` names {name!r}, which cannot be used: {type(error).__name__}: {error}."
    if ":" in name:
        return (
            f"`{key}` names code, {name!r}. Code in a recipe is imported only if the command line says so too: add "
            f"`--allow_local_code {name}` if you trust it."
        )
    return value_problem(key, name, choices=[*known])


@cache
def _sources() -> dict[str, str]:
    """Returns the source of every module that may hold a record, by its full name."""
    root = Path(__file__).parents[1]
    files = sorted(file for folder in _FOLDERS for file in (root / folder).rglob("*.py"))
    names = (".".join((PACKAGE, *file.relative_to(root).with_suffix("").parts)) for file in files)
    return {
        name.removesuffix(".__init__"): file.read_text(encoding="utf-8")
        for name, file in zip(names, files, strict=True)
    }


@cache
def _built_in(kind: Kind) -> tuple[Entry, ...]:
    """Returns the methods of this package. A file that makes no record of this kind is not parsed."""
    found, record = [], f"= {_CLASSES[kind].__name__}("
    for module in (one for one, text in _sources().items() if record in text):
        named = ((name, static.record(module, name)) for name in static.record_names(module))
        found += [
            Entry(one, module, name, PACKAGE) for name, one in named if isinstance(one, Method) and one.kind == kind
        ]
    return tuple(found)


@cache
def _entry_points() -> EntryPoints:
    return cast(EntryPoints, entry_points())


@cache
def _installed(kind: Kind) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the usable methods of a kind, and what is wrong with the others."""
    found = {entry.method.key: entry for entry in _built_in(kind)}
    problems: dict[str, str] = {}
    for point in _entry_points().select(group=GROUPS[kind]) if kind in GROUPS else ():
        package = point.dist.name if point.dist else point.module
        try:
            entry = _entry(kind, point.module, point.attr, package)
            if entry.method.key != point.name:
                raise ValueError(f"its record has the key {entry.method.key!r}")
        except Exception as error:  # whatever stands in another package's file
            problems[point.name] = (
                f"The {kind} {point.name!r} of the package {package} ({point.value}) cannot be used: "
                f"{type(error).__name__}: {error}. Update or uninstall that package."
            )
            continue
        if other := found.get(point.name):
            if (other.module, other.name) != (entry.module, entry.name):
                problems[point.name] = (
                    f"The {kind} {point.name!r} comes with two packages, {other.package} and {package}, and a recipe "
                    f"must mean one thing. Uninstall one of them, or rename it (entry-point group {GROUPS[kind]!r})."
                )
        else:
            found[point.name] = entry
    ours = {name for name, entry in found.items() if entry.package == PACKAGE}
    return {name: entry for name, entry in found.items() if name in ours or name not in problems}, problems


def _entry(kind: Kind, module: str, attribute: str, package: str) -> Entry:
    method = static.record(module, attribute)
    if not isinstance(method, Method) or method.kind != kind:
        raise TypeError(f"`{attribute}` has no record of {'an' if kind[0] in 'aeiou' else 'a'} {kind}")
    for ours in (one for other in _CLASSES for one in _built_in(other) if one.method.key == method.key):
        is_local = package == module  # the same key of the same kind is a clash of packages, which says more
        if ours.method.kind != kind or (is_local and (ours.module, ours.name) != (module, attribute)):
            raise ValueError(f"its key {method.key!r} is that of a method of {PACKAGE}: give it another")
    return Entry(method, module, attribute, package)


def _local(kind: Kind, name: str) -> Entry:
    module, _, attribute = name.partition(":")
    return _entry(kind, module, attribute, module)


def _is_local(kind: Kind, name: str) -> bool:
    """Whether allowed code is a method of this kind; a reward function is none."""
    try:
        return bool(_local(kind, name))
    except Exception:  # whatever stands in a user's file; `name_problem` says what, where it is named
        return False
