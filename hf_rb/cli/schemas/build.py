"""Makes the schemas from the config classes."""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable
from importlib import import_module, metadata
from typing import Any

from hf_rb.cli import schemas
from hf_rb.utils.fields import is_described


__all__ = ["build"]

_NAMES = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str", dict: "dict"}

# What the libraries' own fields may be, where they say it nowhere, or after models are loaded.
_RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "generation_batch_size",
            "steps_per_generation",
            "num_iterations",
            "num_generations_eval",
            "max_length",
            "max_completion_length",
            "max_new_tokens",
            "save_total_limit",
            "lora_r",
            "lora_alpha",
        ),
        "[1, inf)",
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "temperature", "test_split_size"), "(0, inf)"),
    **dict.fromkeys(
        ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "dataloader_num_workers"),
        "[0, inf)",
    ),
    **dict.fromkeys(("lora_dropout", "label_smoothing_factor"), "[0, 1)"),
    "lmbda": "[0, 1]",
    "max_steps": "[-1, inf)",  # -1: as many as the epochs have
    "num_generations": "[2, inf)",
    "top_p": "(0, 1]",
}


def build(name: str) -> str:
    """Returns the text of one schema."""
    module, _, attribute = (schemas.RECIPES | schemas.QUANTIZATION | schemas.PARTS)[name].partition(":")
    source = getattr(import_module(module), attribute)
    configs = [source] if dataclasses.is_dataclass(source) else source().dataclass_types
    versions = {library: _minor(library) for library in ("transformers", "trl")}
    return json.dumps({"versions": versions, "keys": _keys(configs)}, indent=1, ensure_ascii=False) + "\n"


def _minor(library: str) -> str:
    return ".".join(metadata.version(library).split(".")[:2])


def _keys(configs: Iterable[type]) -> dict[str, dict]:
    return {
        field.name: _entry(field, typing.get_type_hints(config)[field.name])
        for config in configs
        for field in dataclasses.fields(config)
        if field.init
    }


def _entry(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    entry = {
        "types": sorted({_name(option) for option in _options(hint)}),
        "default": default.value if isinstance(default, enum.Enum) else default,
        "choices": list(field.metadata.get("choices") or _choices(hint)) or None,
        "range": field.metadata.get("range") or _RANGES.get(field.name),
        "help": field.metadata.get("help", "").replace("%%", "%"),
        "own": is_described(field) or None,
    }
    if default is dataclasses.MISSING:
        del entry["default"]
    elif default is None:  # TrainingArguments has fields typed `str` whose default is None
        entry["types"] = sorted({*entry["types"], "null"})
    if field.name in (
        "resume_from_checkpoint",
        "scale_rewards",
    ):  # typed as text, and TRL and transformers take booleans
        entry["types"].append("bool")
    for option in _options(hint):
        for argument in (option, *typing.get_args(option)):
            if dataclasses.is_dataclass(argument) and typing.get_origin(option) is list:
                entry["keys"] = _keys([argument])
    return {key: value for key, value in entry.items() if value is not None or key == "default"}


def _options(hint: Any) -> tuple:
    """The alternatives of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _name(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is list:
        return f"list[{_name(*typing.get_args(option))}]" if typing.get_args(option) else "list[any]"
    if origin is typing.Literal:
        return _NAMES[type(typing.get_args(option)[0])]
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "str"
    if dataclasses.is_dataclass(origin):
        return "dict"
    return _NAMES.get(origin, "any")


def _choices(hint: Any) -> list:
    """The values of a `Literal` or of an enumeration, which the config converts a string to."""
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal and str not in _options(hint):
            return list(typing.get_args(option))
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return [member.value for member in option]
    return []
