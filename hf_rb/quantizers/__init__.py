"""Quantization backends for `from_pretrained(..., quantization_config=...)`, and what `hf-rb quantize`, `dequantize`, `export` do."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.quantizers.export import dequantize_checkpoint, export_gptq
    from hf_rb.quantizers.offline import measure_perplexity, quantize
    from hf_rb.quantizers.report import LayerReport, Report
    from hf_rb.quantizers.streaming import quantize_checkpoint

__all__ = [
    "LayerReport",
    "Report",
    "dequantize_checkpoint",
    "export_gptq",
    "measure_perplexity",
    "quantize",
    "quantize_checkpoint",
]

# On first use: a configuration below this folder is read without what its quantizer needs.
_MODULES = {
    "LayerReport": "report",
    "Report": "report",
    "dequantize_checkpoint": "export",
    "export_gptq": "export",
    "measure_perplexity": "offline",
    "quantize": "offline",
    "quantize_checkpoint": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
