"""Base of the configurations of the quantization backends, importable without torch."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rb.utils.import_hooks import require


__all__ = ["FORMAT_VERSION", "PackedConfig"]

FORMAT_VERSION = 1


class PackedConfig(QuantizationConfigMixin):
    """A dataclass with the fields `quant_method`, `format_version` and `dequantize`, of which the last is never
    stored.
    """

    is_packed_config: ClassVar[bool] = True  # tells our configs without an import
    method: ClassVar[str]
    # Every config has these fields, in an order of its own.
    modules_to_not_convert: list[str] | None
    dequantize: bool
    format_version: int
    loading: ClassVar[tuple[str, ...]] = ("dequantize",)  # what may be given when a checkpoint is loaded
    written: ClassVar[tuple[str, ...]] = ()  # fields that quantizing fills in
    calibrated: ClassVar[bool] = False  # a property where the method may run the model on text

    def __post_init__(self):
        require("transformers")
        self.check_version(self.format_version)

    @property
    def summary(self) -> str:
        """Sentence about the quantization of a model."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        cls.check_version(config_dict.get("format_version", FORMAT_VERSION))  # a newer format may have other keys
        names = [field.name for field in fields(cls)]
        for key in config_dict:
            if key not in names:
                close = get_close_matches(key, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(names)}."
                raise ValueError(f"{cls.__name__} has no key {key!r}; {hint}")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Returns fields that may differ between the stored configuration and the one given to `from_pretrained`."""
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
