"""Rules for the fields of `DistillationConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from hf_rb.methods.registry import methods
from hf_rb.methods.rules import defaults_of
from hf_rb.trainers.common.rules import objective_rules


__all__ = ["distillation_rules", "only_gkd"]


def only_gkd(name: str) -> str | None:
    """Returns what to say of a field that acts on the completions of a dataset, where another trainer is
    configured.
    """
    if name not in _fields_of_gkd():
        return None
    return (
        f"`{name}` acts on the completions of the dataset, which GKD alone distils on. Use `GKDTrainer` (`hf-rb "
        f"gkd`) with `lmbda: 0.0`, or remove `{name}`."
    )


@cache
def _fields_of_gkd() -> set[str]:
    """Returns the flags of objectives that need the dataset's completions, and of what is mixed into a divergence."""
    labelled = [entry.method for entry in methods("objective").values() if entry.method.completions == "dataset"]
    mixed = [methods("trainer")[key].method for key in ("llm_neo", "loca")]
    return {"teacher_cache", *(name for method in (*labelled, *mixed) for name in defaults_of(method))}


def distillation_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with our fields of a [`DistillationConfig`]."""
    yield from objective_rules(config, beta=1.0, of_trl="jsd")
    entry = methods("objective").get(config.objective)
    if entry and entry.method.completions == "dataset":
        yield (
            f"`objective: {config.objective}` trains on the completions of the dataset, and `DistillationTrainer` on "
            "the student's own. Use `GKDTrainer` (`hf-rb gkd`) with `lmbda: 0.0`."
        )
    several = isinstance(config.teacher_model_name_or_path, dict)
    if config.teacher_model_name_or_path is not None and several != (config.gopd_teacher_column is not None):
        yield (
            "Several teachers, `teacher_model_name_or_path: {math: ..., code: ...}`, and `gopd_teacher_column`, "
            "the dataset column that chooses among them, go together; got `teacher_model_name_or_path: "
            f"{config.teacher_model_name_or_path}` and `gopd_teacher_column: {config.gopd_teacher_column}`."
        )
