"""Records of methods, and the registry of ours and those of installed packages. Standard library only."""

from hf_rb.methods.record import (
    MergeMethod,
    Method,
    Metric,
    ModelMethod,
    ObjectiveMethod,
    Paper,
    QuantizerMethod,
    ShaperMethod,
    flag,
)


__all__ = [
    "MergeMethod",
    "Method",
    "Metric",
    "ModelMethod",
    "ObjectiveMethod",
    "Paper",
    "QuantizerMethod",
    "ShaperMethod",
    "flag",
]
