"""The keys of a recipe from the config classes themselves, which `hf_rb.cli.schemas` must read from their sources."""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from hf_rb.cli import schemas
from hf_rb.cli.schemas.entry import TYPE_NAMES, make_entry
from hf_rb.methods.registry import find
from hf_rb.utils.fields import is_described


def configs_of(name: str) -> list[type]:
    """Returns the dataclasses whose fields are the keys of a schema."""
    sources = (schemas.RECIPES | schemas.PARTS).get(name) or (find("quantizer", name).method.config,)
    return [getattr(import_module(module), cls) for module, cls in (source.split(":") for source in sources)]


def keys_of(configs: Iterable[type]) -> dict[str, dict[str, Any]]:
    """Returns the entries of all fields of config classes."""
    return {
        field.name: _entry(field, typing.get_type_hints(config)[field.name])
        for config in configs
        for field in dataclasses.fields(config)
        if field.init
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
        own=is_described(field),
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
