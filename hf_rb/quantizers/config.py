"""What the configurations of the quantization backends share, importable without torch."""

import re
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rb import _registration


__all__ = ["FORMAT_VERSION", "PackedConfig"]

FORMAT_VERSION = 1


class PackedConfig(QuantizationConfigMixin):
    """A dataclass with the fields `quant_method`, `format_version` and `dequantize`, of which the last is never stored."""

    method: ClassVar[str]
    loading: ClassVar[tuple[str, ...]] = ("dequantize",)  # what may be given when a checkpoint is loaded

    def __post_init__(self):
        _registration.require("transformers")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        cls.check_version(config_dict.get("format_version", FORMAT_VERSION))  # a newer format may have other keys
        names = [field.name for field in fields(cls)]
        for key in config_dict:
            if key not in names:
                close = get_close_matches(key, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(names)}."
                raise ValueError(f"{cls.__name__} has no key {key!r}; {hint}")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What may differ between the stored configuration and the one given to `from_pretrained`."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in self.loading if getattr(self, name) != defaults[name]}

    def to_dict(self) -> dict[str, Any]:
        """Returns what is stored in `config.json`."""
        stored = super().to_dict()
        del stored["dequantize"]
        return stored

    @classmethod
    def check_version(cls, version: Any) -> None:
        if version != FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has {cls.method} format version {version}, this hf_rb reads {FORMAT_VERSION}. "
                "Update hf_rb."
            )

    def pattern_rules(self, per_layer: str, example: str) -> Iterator[str]:
        """What is wrong with `modules_to_not_convert` and with the dict `per_layer`, both of which name modules."""
        skipped, values = self.modules_to_not_convert, getattr(self, per_layer)
        if isinstance(skipped, str):
            yield f"`modules_to_not_convert` must be a list; got {skipped!r}, so write [{skipped!r}]."
        if not isinstance(skipped, (list, tuple, NoneType)):
            yield f"`modules_to_not_convert` must be a list of names; got {skipped!r}."
        if not isinstance(values, (dict, NoneType)):
            yield f"`{per_layer}` must be a dict such as {example}; got {values!r}."
        for name, patterns in (("modules_to_not_convert", skipped), (per_layer, values)):
            yield from (problem for pattern in patterns or () if (problem := _pattern_problem(name, pattern)))


def _pattern_problem(name: str, pattern: Any) -> str | None:
    if not isinstance(pattern, str):
        return f"`{name}` has {pattern!r}; expected the name of a module, an ending or a regular expression."
    try:
        re.compile(f"(?:{pattern})")
    except re.error as error:
        hint = f"write {pattern.strip('*.')!r} for whatever ends so" if pattern.startswith("*") else "`.*` is any text"
        return f"`{name}` has {pattern!r}, which is no regular expression ({error.msg}); {hint}."
