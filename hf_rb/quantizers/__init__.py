"""Quantization backends for `from_pretrained(..., quantization_config=...)`, and the function behind `hf-rb quantize`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.quantizers.offline import quantize
    from hf_rb.quantizers.report import LayerReport, Report
    from hf_rb.quantizers.streaming import quantize_checkpoint

__all__ = ["LayerReport", "Report", "quantize", "quantize_checkpoint"]

# On first use: a configuration below this folder is read without what its quantizer needs.
_MODULES = {
    "LayerReport": "report",
    "Report": "report",
    "quantize": "offline",
    "quantize_checkpoint": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
