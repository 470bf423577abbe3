"""Models made from models, without training, file by file over safetensors."""

from typing import TYPE_CHECKING

from hf_rb.utils.lazy import lazy_names


if TYPE_CHECKING:
    from hf_rb.weights.adapters import adapter_problems, combine_adapters
    from hf_rb.weights.callback import GraftCallback
    from hf_rb.weights.interpolation import interpolate, interpolate_tensors
    from hf_rb.weights.merging import merge_models
    from hf_rb.weights.report import MergeReport, TensorReport
    from hf_rb.weights.shadow_ft import graft, graft_tensors, sigma
    from hf_rb.weights.timber import effective_rank, refine, refine_tensors

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
    "merge_models",
    "refine",
    "refine_tensors",
    "sigma",
]

# On first use: streaming needs torch alone, and the callback transformers.
__getattr__, __dir__ = lazy_names(__name__)
