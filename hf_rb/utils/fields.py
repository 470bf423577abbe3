"""Rules for the values of a configuration, said once: configs enforce them, `hf-rb check` reads them without importing
torch.

A field declares its choices and its range where it is defined:

    profit_threshold: float | None = flag(None, "...", range="[0, 1]")

A range is an interval in the usual notation, `"[0, 1]"`, `"(0, inf)"`. What depends on several fields is a rule: a
function of the configuration (or of anything with its attributes) that yields one message for each thing wrong.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args


__all__ = [
    "Rule",
    "default_of",
    "described",
    "documented",
    "flag",
    "is_described",
    "parameters",
    "validate",
    "value_problem",
]

Rule = Callable[[Any], Iterable[str]]
Config = TypeVar("Config")


class _Metadata(dict):
    # HfArgumentParser hands a copy of the metadata to argparse, which refuses these keywords.
    def copy(self) -> dict[str, Any]:
        return _Metadata({key: value for key, value in self.items() if key not in ("range", "secret")})


def described(help: str, *, choices: Sequence | None = None, range: str | None = None) -> dict[str, Any]:
    """Returns the metadata of a dataclass field."""
    given = {"help": help.replace("%", "%%"), "choices": choices, "range": range}  # argparse formats the help
    return _Metadata({key: value for key, value in given.items() if value is not None})


def flag(
    default: Any, help: str, *, choices: Sequence | None = None, range: str | None = None, secret: bool = False
) -> Any:
    """Returns a dataclass field of a config: its default, help, choices and range. Every config gets its own copy of a
    list or a dict. No message repeats the value of a `secret` one.
    """
    metadata = _Metadata(described(help, choices=choices, range=range) | ({"secret": True} if secret else {}))
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def documented(config_class: type[Config]) -> type[Config]:
    """Adds the section of parameters to the docstring of a config, from the help of its own fields."""
    fields = filter(is_described, dataclasses.fields(config_class))  # type: ignore[arg-type]
    text, raises, more = inspect.cleandoc(config_class.__doc__ or "").partition("\nRaises:")
    config_class.__doc__ = f"{text.rstrip()}\n\nParameters:\n{parameters(fields)}\n{raises}{more}"
    return config_class


def default_of(field: dataclasses.Field) -> Any:
    """Returns the default of a field, `dataclasses.MISSING` without one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def parameters(fields: Iterable[dataclasses.Field]) -> str:
    """Returns the lines of a docstring about fields with the metadata of [`described`]."""
    lines = []
    for field in fields:
        kind = str(getattr(field.type, "__name__", field.type) if isinstance(field.type, type) else field.type)
        default = default_of(field)
        shown = "" if default is None or default is dataclasses.MISSING else f", defaults to `{default!r}`"
        lines.append(f"    {field.name} (`{kind.removesuffix(' | None')}`, *optional*{shown}):")
        limits = f" In `{field.metadata['range']}`." if "range" in field.metadata else ""
        limits += f" One of {', '.join(map(repr, field.metadata['choices']))}." if "choices" in field.metadata else ""
        text = field.metadata["help"].replace("%%", "%") + limits
        lines += textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False)
    return "\n".join(lines)


def is_described(field: dataclasses.Field) -> bool:
    """Says whether a field of a config is ours, with the metadata of [`described`]."""
    return isinstance(field.metadata.copy(), _Metadata)


def value_problem(name: str, value: Any, *, choices: Sequence | None = None, range: str | None = None) -> str | None:
    """Returns what is wrong with the value of one field, or `None`. A value of `None` is never wrong here."""
    if value is None:
        return None
    if choices is not None and value not in choices:
        names = {str(choice).casefold(): str(choice) for choice in choices}
        close = get_close_matches(str(value).casefold(), names, n=1)
        hint = f"did you mean {names[close[0]]!r}?" if close else f"it must be one of {', '.join(map(repr, choices))}."
        return f"`{name}` cannot be {value!r}; {hint}"
    if range is not None and not (isinstance(value, (int, float)) and _inside(value, range)):
        return f"`{name}` must be in {range}; got {value!r}."
    return None


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _type_problem(field: dataclasses.Field, value: Any) -> str | None:
    # Only integers and truth values: others have choices or ranges, or are what argparse makes of them.
    types = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    for kind, name in ((bool, "True or False"), (int, "an integer")):
        if set(types) <= {kind, NoneType} and kind in types and type(value) not in types:
            return f"`{field.name}` must be {name}; got {value!r}."
    return None


def validate(config: Any, *rules: Rule) -> None:
    """Checks a dataclass against the types, choices and ranges of its described fields, then against the rules.

    Raises:
        ValueError: With the first thing that is wrong.
    """
    for problem in _problems(config, rules):
        raise ValueError(problem)


def _problems(config: Any, rules: Iterable[Rule]) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        limits = {key: field.metadata[key] for key in ("choices", "range") if key in field.metadata}
        # Others are checked by the library they are of.
        problem = is_described(field) and _type_problem(field, value) or value_problem(field.name, value, **limits)
        if problem:
            yield problem
    for rule in rules:
        yield from rule(config)
