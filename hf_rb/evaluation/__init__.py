"""Quality and cost of a model: perplexity, exact match, public benchmarks, size on disk and decoding speed."""

from hf_rb.evaluation.generation import Completion, ExactMatch, PassAtK, exact_match, generate, pass_at_k
from hf_rb.evaluation.harness import HarnessScore, run_harness
from hf_rb.evaluation.likelihood import Perplexity, beginning, perplexity
from hf_rb.evaluation.loading import find_model, load_model
from hf_rb.evaluation.plot import plot_curves
from hf_rb.evaluation.size import Size, model_size
from hf_rb.evaluation.speed import Speed, decode_speed
from hf_rb.evaluation.tasks import is_correct, load_task, solutions
from hf_rb.evaluation.verdict import Verdict, judge
from hf_rb.utils.output import format_table


__all__ = [
    "Completion",
    "ExactMatch",
    "HarnessScore",
    "PassAtK",
    "Perplexity",
    "Size",
    "Speed",
    "Verdict",
    "beginning",
    "decode_speed",
    "exact_match",
    "find_model",
    "format_table",
    "generate",
    "is_correct",
    "judge",
    "load_model",
    "load_task",
    "model_size",
    "pass_at_k",
    "perplexity",
    "plot_curves",
    "run_harness",
    "solutions",
]
