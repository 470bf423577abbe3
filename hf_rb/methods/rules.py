"""Rules that follow from what methods say of themselves. Standard library only: `hf-rb check` runs them."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

from hf_rb.methods.record import Kind, Method
from hf_rb.methods.registry import methods
from hf_rb.utils.fields import default_of


__all__ = ["defaults_of", "flag_rules"]


def defaults_of(method: Method) -> dict[str, Any]:
    """Returns the defaults of a method's flags, by field."""
    return {field.name: default_of(field) for field in dataclasses.fields(method.flags)} if method.flags else {}


def flag_rules(config: Any, kind: Kind, active: Collection[str], remedy: Callable[[str, str], str]) -> Iterator[str]:
    """
    Yields what is wrong with the flags of the methods of a kind: values of a method that is off, and what each method
    that is on says itself.

    Args:
        config (`Any`):
            A config, or anything with its fields.
        kind (`str`):
            The kind.
        active (`Collection[str]`):
            Names of the methods that are on.
        remedy (`Callable[[str, str], str]`):
            From the name of a method that is off and one of its flags to the rest of the sentence that begins with the
            flag and its value.
    """
    known = methods(kind)
    acting = {field for name in active if name in known for field in defaults_of(known[name].method)}
    for name, entry in known.items():
        if name in active:
            yield from entry.method.rules(config)
            continue
        for field, default in defaults_of(entry.method).items():
            value = getattr(config, field, default)
            if value != default and field not in acting:
                is_secret = "secret" in entry.method.flags.__dataclass_fields__[field].metadata
                yield f"`{field}{'' if is_secret else f': {value}'}` {remedy(name, field)}"
