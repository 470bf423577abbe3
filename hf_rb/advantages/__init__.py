"""Shaping of GRPO's advantages: pure functions on groups of rollouts, and the pipeline that runs them in a trainer."""

from hf_rb.advantages.pipeline import (
    Requires,
    SequenceShaper,
    Shaped,
    ShapingContext,
    TokenShaper,
    build_shapers,
    check_shapers,
    run_pipeline,
)


__all__ = [
    "Requires",
    "SequenceShaper",
    "Shaped",
    "ShapingContext",
    "TokenShaper",
    "build_shapers",
    "check_shapers",
    "run_pipeline",
]
