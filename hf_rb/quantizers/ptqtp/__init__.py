"""PTQTP: post-training quantization to trit-planes (https://huggingface.co/papers/2509.16989)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.quantizers.ptqtp.config import PTQTPConfig
    from hf_rb.quantizers.ptqtp.experts import PTQTPExperts
    from hf_rb.quantizers.ptqtp.linear import PTQTPLinear
    from hf_rb.quantizers.ptqtp.packing import TritPlanes
    from hf_rb.quantizers.ptqtp.quantizer import PTQTPQuantizer
    from hf_rb.quantizers.ptqtp.solver import solve

__all__ = ["PTQTPConfig", "PTQTPExperts", "PTQTPLinear", "PTQTPQuantizer", "TritPlanes", "solve"]

_MODULES = {
    "PTQTPConfig": "config",
    "PTQTPExperts": "experts",
    "PTQTPLinear": "linear",
    "PTQTPQuantizer": "quantizer",
    "TritPlanes": "packing",
    "solve": "solver",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
