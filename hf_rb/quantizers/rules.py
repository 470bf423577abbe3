"""Rules for the fields of any quantization config. Standard library only: `hf-rb check` runs these without torch."""

import re
from collections.abc import Iterator
from types import NoneType
from typing import Any

from hf_rb.methods import QuantizerMethod


__all__ = ["nsds_budget", "quantizer_rules"]


def quantizer_rules(method: QuantizerMethod, config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a config of a method: with the names of modules in it, and what the
    method says itself.
    """
    yield from _skip_rules(config.modules_to_not_convert)
    if method.unit:
        yield from _layer_rules(method, getattr(config, method.per_layer))
    yield from method.rules(config)


def nsds_budget(strategy: str) -> float | None:
    """Returns 3.0 for `"nsds:3.0"`, `None` for anything else."""
    found = re.fullmatch(r"nsds:(\d+(?:\.\d+)?)", strategy)
    return float(found[1]) if found else None


def _skip_rules(skipped: Any) -> Iterator[str]:
    if isinstance(skipped, str):
        yield f"`modules_to_not_convert` must be a list; got {skipped!r}, so write [{skipped!r}]."
    if not isinstance(skipped, (list, tuple, NoneType)):
        yield f"`modules_to_not_convert` must be a list of names; got {skipped!r}."
    yield from _pattern_rules("modules_to_not_convert", skipped if isinstance(skipped, (list, tuple)) else ())


def _layer_rules(method: QuantizerMethod, values: Any) -> Iterator[str]:
    name = method.per_layer
    if isinstance(values, str) and method.nsds:
        low, high = method.nsds
        if (budget := nsds_budget(values)) is None or not low <= budget <= high:
            yield (
                f"`{name}` as text must be 'nsds:' and an average from {low} to {high}, such as "
                f"'nsds:{(low + high) / 2}'; got {values!r}."
            )
    elif not isinstance(values, (dict, NoneType)):
        yield f'`{name}` must be a dict such as {{"down_proj": {max(method.units)}}}; got {values!r}.'
    values = values if isinstance(values, dict) else {}
    yield from _pattern_rules(name, values)
    for pattern, number in values.items():
        if type(number) is not int or number not in method.units:
            *others, last = map(str, method.units)
            yield f"`{name}[{pattern!r}]` must be {', '.join(others)} or {last}; got {number!r}."


def _pattern_rules(name: str, patterns: Any) -> Iterator[str]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            yield f"`{name}` has {pattern!r}; expected the name of a module, an ending or a regular expression."
            continue
        try:
            re.compile(f"(?:{pattern})")
        except re.error as error:
            hint = f"write {pattern.strip('*.')!r} for whatever ends so" if pattern[0] == "*" else "`.*` is any text"
            yield f"`{name}` has {pattern!r}, which is no regular expression ({error.msg}); {hint}."
