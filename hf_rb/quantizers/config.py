"""Base of the configurations of the quantization backends, importable without torch."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_rb.methods import QuantizerMethod, flag
from hf_rb.quantizers.rules import quantizer_rules
from hf_rb.utils.fields import validate
from hf_rb.utils.import_hooks import require


__all__ = ["FORMAT_VERSION", "PackedConfig"]

FORMAT_VERSION = 1


@dataclass(repr=False)
class PackedConfig(QuantizationConfigMixin):
    """
    The flags of every method. A method derives its config from it, says which method it is, and adds its own:

        @documented
        @dataclass
        class MyConfig(PackedConfig):
            record: ClassVar[QuantizerMethod] = METHOD

            quant_method: str = flag("mine", "The method's name.", choices=("mine",))
            group_size: int = flag(128, "Neighbouring weights of a row that share their scales.", range="[1, inf)")
    """

    is_packed_config: ClassVar[bool] = True  # tells our configs without an import
    record: ClassVar[QuantizerMethod]
    loading: ClassVar[tuple[str, ...]] = ("dequantize",)  # what may be given when a checkpoint is loaded
    idle: ClassVar[tuple[str, ...]] = ()  # fields without effect, which a model card does not show

    modules_to_not_convert: list[str] | None = flag(
        None,
        "Names, endings (of whole components: `mlp.up_proj`) or regular expressions from the start of a name, of "
        "modules to leave as they are, in addition to the output embeddings, heads of every kind and poolers, "
        "everything tied to the input embeddings, linear layers beside fused experts (routers), and what is "
        "outside the language model of a multimodal one, none of which is ever quantized.",
    )
    dequantize: bool = flag(
        False, "For loading a quantized checkpoint: turn it into ordinary layers and experts. Not stored."
    )
    format_version: int = flag(FORMAT_VERSION, "Version of the file format.")

    def __post_init__(self):
        require("transformers")
        self.check_version(self.format_version)
        validate(self, partial(quantizer_rules, self.record))

    @property
    def summary(self) -> str:
        """Sentence about the quantization of a model."""
        return self.record.summary

    @property
    def calibrated(self) -> bool:
        """Returns whether the model is run on text to quantize it."""
        return self.record.is_calibrated(vars(self))

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
                f"This checkpoint has {cls.record.name} format version {version}, this hf_rb reads {FORMAT_VERSION}. "
                "Update hf_rb."
            )
