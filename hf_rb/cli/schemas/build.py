"""Makes the schemas of our keys from the config classes."""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from hf_rb.cli import schemas
from hf_rb.cli.schemas.entry import TYPE_NAMES, make_entry
from hf_rb.utils.fields import is_described


__all__ = ["build", "configs_of", "keys_of"]

# Our own class for one that TRL may drop without notice, by that one.
STAND_INS = {"trl.experimental.gkd:GKDConfig": "hf_rb.trainers.gkd.base_config:GKDArguments"}


def build(name: str) -> str:
    """Returns the text of one schema."""
    configs = configs_of(name)
    libraries = [libraries_of(config) for config in configs]
    schema = {"libraries": [found for found in libraries if found], "keys": keys_of(configs, own=True)}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def configs_of(name: str) -> list[type]:
    """Returns the dataclasses whose fields are the keys of a schema."""
    module, _, attribute = (schemas.RECIPES | schemas.QUANTIZATION | schemas.PARTS)[name].partition(":")
    source = getattr(import_module(module), attribute)
    return [source] if dataclasses.is_dataclass(source) else list(source().dataclass_types)


def libraries_of(config: type) -> list[str]:
    """
    Returns the library's class that a config class stands on, by its public name. TRL may drop an experimental one:
    what stands in for it and the next base follow it, for a version without.
    """
    found = []
    for base in config.__mro__:
        if dataclasses.is_dataclass(base) and not base.__module__.startswith("hf_rb."):
            name = _public_name(base)
            found += filter(None, [name, STAND_INS.get(name)])
            if "experimental" not in name:
                break
    return found


def _public_name(config: type) -> str:
    """Returns module and name of a class, of the packages that have it the outermost."""
    parts = config.__module__.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    module = next(one for one in modules if getattr(import_module(one), config.__name__, None) is config)
    return f"{module}:{config.__name__}"


def keys_of(configs: Iterable[type], own: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the entries of all fields of config classes, or of our own fields alone."""
    return {
        field.name: _entry(field, typing.get_type_hints(config)[field.name])
        for config in configs
        for field in dataclasses.fields(config)
        if field.init and (is_described(field) or not own)
    }


def _entry(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    default = {}
    if field.default_factory is not dataclasses.MISSING:
        default = {"default": field.default_factory()}
    elif field.default is not dataclasses.MISSING:
        default = {"default": field.default.value if isinstance(field.default, enum.Enum) else field.default}
    options = _options(hint)
    return make_entry(
        field.name,
        {_name(option) for option in options},
        choices=field.metadata.get("choices") or _choices(hint),
        range=field.metadata.get("range"),
        help=field.metadata.get("help", ""),
        keys=_nested(options),
        **default,
    )


def _options(hint: Any) -> tuple:
    """The alternatives of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is list:
        return f"list[{_name(*typing.get_args(option))}]" if typing.get_args(option) else "list[any]"
    if origin is typing.Literal:
        return TYPE_NAMES[type(typing.get_args(option)[0])]
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "str"
    if dataclasses.is_dataclass(origin):
        return "dict"
    return TYPE_NAMES.get(origin, "any")


def _choices(hint: Any) -> list:
    """The values of a `Literal` or of an enumeration, which the config converts a string to."""
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal and str not in _options(hint):
            return list(typing.get_args(option))
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return [member.value for member in option]
    return []


def _nested(options: Iterable[Any]) -> dict[str, Any] | None:
    """The fields of the dataclass that a list holds."""
    for option in options:
        for argument in typing.get_args(option):
            if dataclasses.is_dataclass(argument) and typing.get_origin(option) is list:
                return keys_of([typing.cast(type, argument)])
    return None
