"""Quantization backends for `from_pretrained(..., quantization_config=...)`, and what `hf-rb quantize`, `dequantize`,
`export` do.
"""

from typing import TYPE_CHECKING

from hf_rb.utils.lazy import lazy_names
from hf_rb.utils.versions import check_versions


if TYPE_CHECKING:
    from hf_rb.quantizers.folders.gptq import dequantize_checkpoint, export_gptq
    from hf_rb.quantizers.folders.quantize import measure_perplexity, quantize
    from hf_rb.quantizers.folders.stream import quantize_checkpoint
    from hf_rb.quantizers.packed.report import LayerReport, Report

__all__ = [
    "LayerReport",
    "Report",
    "dequantize_checkpoint",
    "export_gptq",
    "measure_perplexity",
    "quantize",
    "quantize_checkpoint",
]

check_versions()

# On first use: a configuration below this folder is read without what its quantizer needs.
__getattr__, __dir__ = lazy_names(__name__)
