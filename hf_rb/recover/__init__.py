"""Quantize, measure, win the loss back by LoRA distillation from the full-precision model, measure, package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_rb.recover.config import RecoverConfig
    from hf_rb.recover.failures import Comparison, compare_failures
    from hf_rb.recover.measuring import load_recovered
    from hf_rb.recover.pipeline import recover
    from hf_rb.recover.report import RecoverReport

# On first use: `hf-rb check` reads the configuration without torch.
_MODULES = {
    "Comparison": "failures",
    "RecoverConfig": "config",
    "RecoverReport": "report",
    "compare_failures": "failures",
    "load_recovered": "measuring",
    "recover": "pipeline",
}

__all__ = ["Comparison", "RecoverConfig", "RecoverReport", "compare_failures", "load_recovered", "recover"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
