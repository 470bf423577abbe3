"""Rules for the fields of `GKDConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from typing import Any

from hf_rb.methods.registry import methods
from hf_rb.trainers.common.rules import objective_rules, trainer_rules


__all__ = ["cache_rules", "gkd_rules"]


def gkd_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`GKDConfig`]."""
    yield from objective_rules(config, beta=0.5)
    yield from trainer_rules(config)
    objective, lmbda = config.objective, config.lmbda
    entry = methods("objective").get(objective)
    wanted = {"dataset": 0.0, "student": 1.0}.get(entry.method.completions, lmbda) if entry else lmbda
    if entry and lmbda != wanted:
        yield f"`objective: {objective}` needs `lmbda: {wanted}`: {entry.method.because}; got `lmbda: {lmbda}`."
    if lmbda == 0 and not config.seq_kd and config.temperature not in (0.9, 1.0):
        yield (
            f"`temperature: {config.temperature}` has no effect with `lmbda: 0.0`: it is that of sampling, nothing "
            "is sampled, and the loss is at temperature 1, as in TRL. Remove it."
        )
    if config.seq_kd and lmbda == 1:
        yield (
            "`seq_kd: true` has no effect with `lmbda: 1.0`, where every completion is the student's. Set `lmbda` "
            "below 1, or remove `seq_kd`."
        )
    if config.teacher_cache is not None:
        yield from cache_rules(config)
    if (lmbda > 0 or config.seq_kd) and (config.packing or config.padding_free):
        name = "packing" if config.packing else "padding_free"
        reason = "seq_kd: true" if lmbda == 0 else f"lmbda: {lmbda}"
        yield (
            f"`{name}: true` needs completions from the dataset, and `{reason}` generates them from one prompt a "
            f"row. Set `{name}: false`, or `lmbda: 0.0` without `seq_kd`."
        )
    if config.loss_type != "nll":
        yield (
            f"`loss_type: {config.loss_type}` is a loss of SFT, and `objective: {objective}` replaces it. Remove "
            "`loss_type`."
        )
    if config.label_smoothing_factor > 0:
        yield (
            f"`label_smoothing_factor: {config.label_smoothing_factor}` acts on SFT's loss, which `objective: "
            f"{objective}` replaces. Remove it."
        )


def cache_rules(config: Any) -> Iterator[str]:
    """Yields what a [`GKDConfig`] may not say with a cached teacher."""
    cached = [name for name, entry in methods("objective").items() if entry.method.cached]
    if config.objective not in cached:
        yield (
            f"`teacher_cache` holds the teacher's most probable tokens, and `objective: {config.objective}` needs "
            f"all of them. Set {' or '.join(f'`objective: {name}`' for name in cached)}, or give "
            "`teacher_model_name_or_path` instead of the cache."
        )
    if config.lmbda > 0:
        yield (
            "`teacher_cache` needs `lmbda: 0.0`: it holds the completions of the dataset, not those that the student "
            f"will sample; got `lmbda: {config.lmbda}`."
        )
    for name, wrong, remedy in (
        ("seq_kd", True, "seq_kd: false"),
        ("loss_impl", "dense", "loss_impl: chunked"),
    ):
        if getattr(config, name) == wrong:
            yield (
                f"`{name}: {str(wrong).lower()}` needs the teacher itself, and `teacher_cache` is there to leave it "
                f"out. Set `{remedy}`, or give `teacher_model_name_or_path` instead of the cache."
            )
    if config.teacher_model_name_or_path is not None:
        yield "`teacher_cache` and `teacher_model_name_or_path` are two teachers. Remove one."
