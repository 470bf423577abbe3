"""Models made from models, without training: interpolation, Shadow-FT's graft and Timber, file by file over safetensors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.weights.adapters import adapter_problems, combine_adapters
    from hf_rb.weights.callback import GraftCallback
    from hf_rb.weights.interpolation import interpolate, interpolate_tensors
    from hf_rb.weights.report import MergeReport, TensorReport
    from hf_rb.weights.shadow_ft import graft, graft_tensors, sigma
    from hf_rb.weights.timber import effective_rank, refine, refine_tensors

# On first use: streaming needs torch alone, and the callback transformers.
_MODULES = {
    "GraftCallback": "callback",
    "MergeReport": "report",
    "TensorReport": "report",
    "adapter_problems": "adapters",
    "combine_adapters": "adapters",
    "effective_rank": "timber",
    "graft": "shadow_ft",
    "graft_tensors": "shadow_ft",
    "interpolate": "interpolation",
    "interpolate_tensors": "interpolation",
    "refine": "timber",
    "refine_tensors": "timber",
    "sigma": "shadow_ft",
}

__all__ = [
    "GraftCallback",
    "MergeReport",
    "TensorReport",
    "adapter_problems",
    "combine_adapters",
    "effective_rank",
    "graft",
    "graft_tensors",
    "interpolate",
    "interpolate_tensors",
    "refine",
    "refine_tensors",
    "sigma",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
