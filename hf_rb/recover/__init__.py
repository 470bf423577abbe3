"""Quantize, measure, win the loss back by LoRA distillation from the full-precision model, measure, package."""

from typing import TYPE_CHECKING

from hf_rb.utils.lazy import lazy_names


if TYPE_CHECKING:
    from hf_rb.recover.config import RecoverConfig
    from hf_rb.recover.failures import Comparison, compare_failures
    from hf_rb.recover.measuring import load_recovered
    from hf_rb.recover.pipeline import recover
    from hf_rb.recover.report import RecoverReport

__all__ = ["Comparison", "RecoverConfig", "RecoverReport", "compare_failures", "load_recovered", "recover"]

# On first use: `hf-rb check` reads the configuration without torch.
__getattr__, __dir__ = lazy_names(__name__)
