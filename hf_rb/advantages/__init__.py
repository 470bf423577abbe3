"""Shaping of GRPO's advantages: pure functions on groups of rollouts, and the pipeline that runs them in a trainer."""

from hf_rb.advantages.calibadv import CalibAdvShaper, calibadv
from hf_rb.advantages.edas import EdasShaper, edas, edas_warmup
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
from hf_rb.advantages.rubrics import parse_rubric, parse_verdicts
from hf_rb.advantages.search_steps import silver_documents, step_quality
from hf_rb.advantages.srar import SrarShaper, srar_offsets, srar_step_scores


__all__ = [
    "CalibAdvShaper",
    "EdasShaper",
    "Requires",
    "SequenceShaper",
    "Shaped",
    "ShapingContext",
    "SrarShaper",
    "TokenShaper",
    "build_shapers",
    "calibadv",
    "check_shapers",
    "edas",
    "edas_warmup",
    "parse_rubric",
    "parse_verdicts",
    "run_pipeline",
    "silver_documents",
    "srar_offsets",
    "srar_step_scores",
    "step_quality",
]
