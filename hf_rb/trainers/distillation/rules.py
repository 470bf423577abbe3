"""Rules for the fields of `DistillationConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from typing import Any

from hf_rb.trainers.common.rules import objective_rules


__all__ = ["distillation_rules", "only_gkd"]


def only_gkd(name: str) -> str | None:
    """Returns what to say of a field that acts on the completions of a dataset, where another trainer is
    configured.
    """
    if name not in ("kd_alpha", "loca_alpha", "hpd_sample", "hpd_reinforce", "teacher_cache"):
        return None
    return (
        f"`{name}` acts on the completions of the dataset, which GKD alone distils on. Use `GKDTrainer` (`hf-rb "
        f"gkd`) with `lmbda: 0.0`, or remove `{name}`."
    )


def distillation_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with our fields of a [`DistillationConfig`]."""
    yield from objective_rules(config, beta=1.0)
    if config.objective == "hpd":
        yield (
            "`objective: hpd` trains on the completions of the dataset, and `DistillationTrainer` on the student's "
            "own. Use `GKDTrainer` (`hf-rb gkd`) with `lmbda: 0.0`."
        )
    if config.gopd_tis_cap is not None and not config.use_vllm:
        yield (
            f"`gopd_tis_cap: {config.gopd_tis_cap}` needs a sampler that reports log-probabilities, and generation "
            "by transformers samples from the model in training itself. Set `use_vllm: true`, or remove "
            "`gopd_tis_cap`."
        )
    if config.gopd_full_vocab and config.gopd_teacher_column is not None:
        yield (
            "`gopd_full_vocab: true` compares the student with one teacher's logits, and `gopd_teacher_column` names "
            "several teachers. Remove one of the two."
        )
    several = isinstance(config.teacher_model_name_or_path, dict)
    if config.teacher_model_name_or_path is not None and several != (config.gopd_teacher_column is not None):
        yield (
            "Several teachers, `teacher_model_name_or_path: {math: ..., code: ...}`, and `gopd_teacher_column`, "
            "the dataset column that chooses among them, go together; got `teacher_model_name_or_path: "
            f"{config.teacher_model_name_or_path}` and `gopd_teacher_column: {config.gopd_teacher_column}`."
        )
