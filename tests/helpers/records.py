"""Numbers in the logs, by the records of methods."""

from collections.abc import Iterable

from hf_rb.methods import Metric
from hf_rb.methods.metrics import ROUTER_METRICS, SHAPING_METRICS, TOKEN_METRICS, TRAINER_METRICS
from hf_rb.methods.registry import catalog


__all__ = ["documented", "names_of"]


def names_of(metrics: Iterable[Metric], prefix: str = "") -> set[str]:
    """Returns the names in the logs."""
    found = {prefix + metric.name for metric in metrics}
    return found | {f"{prefix}{m.name}_{end}" for m in metrics if m.extremes for end in ("min", "max")}


def documented() -> set[str]:
    """Returns the names of all recorded metrics of training."""
    found = names_of((*TOKEN_METRICS, *TRAINER_METRICS)) | names_of(ROUTER_METRICS, "router/")
    for key, method in catalog().items():
        if method.kind == "shaper":
            found |= names_of((*SHAPING_METRICS, *method.metrics), f"shaping/{key}/")
        elif method.kind in ("objective", "trainer"):
            found |= names_of(method.metrics)
    return found
