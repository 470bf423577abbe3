"""D²Quant: weight-only quantization to 2 and 3 bits with dual scales (https://huggingface.co/papers/2602.02546)."""

from typing import TYPE_CHECKING

from hf_rb.utils.lazy import lazy_names


if TYPE_CHECKING:
    from hf_rb.quantizers.d2quant.config import D2QuantConfig
    from hf_rb.quantizers.d2quant.layers import D2QuantExperts, D2QuantLinear
    from hf_rb.quantizers.d2quant.maths.dsq import DualScale, fit_dsq
    from hf_rb.quantizers.d2quant.quantizer import D2QuantQuantizer

__all__ = ["D2QuantConfig", "D2QuantExperts", "D2QuantLinear", "D2QuantQuantizer", "DualScale", "fit_dsq"]

__getattr__, __dir__ = lazy_names(__name__)
