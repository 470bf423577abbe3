"""D²Quant: weight-only quantization to 2 and 3 bits with dual scales (https://huggingface.co/papers/2602.02546)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.quantizers.d2quant.config import D2QuantConfig
    from hf_rb.quantizers.d2quant.dsq import DualScale, fit_dsq
    from hf_rb.quantizers.d2quant.experts import D2QuantExperts
    from hf_rb.quantizers.d2quant.linear import D2QuantLinear
    from hf_rb.quantizers.d2quant.quantizer import D2QuantQuantizer

__all__ = ["D2QuantConfig", "D2QuantExperts", "D2QuantLinear", "D2QuantQuantizer", "DualScale", "fit_dsq"]

_MODULES = {
    "D2QuantConfig": "config",
    "D2QuantExperts": "experts",
    "D2QuantLinear": "linear",
    "D2QuantQuantizer": "quantizer",
    "DualScale": "dsq",
    "fit_dsq": "dsq",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
