"""D²Quant: weight-only quantization to 2 and 3 bits with dual scales (https://huggingface.co/papers/2602.02546)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.quantizers.d2quant.config import D2QuantConfig
    from hf_rb.quantizers.d2quant.dsq import DualScale, fit_dsq

__all__ = ["D2QuantConfig", "DualScale", "fit_dsq"]

_MODULES = {
    "D2QuantConfig": "config",
    "DualScale": "dsq",
    "fit_dsq": "dsq",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
