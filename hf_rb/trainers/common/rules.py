"""Rules for the fields that several trainer configs share, each of which yields what is wrong with them. Standard
library only: `hf-rb check` runs these without torch.
"""

from collections.abc import Iterator
from typing import Any


__all__ = ["objective_rules", "packing_rules"]


def packing_rules(config: Any) -> Iterator[str]:
    """Yields what makes packed sequences see each other in every model: rows of evaluation whose collator keeps no
    positions.
    """
    if config.eval_packing and not config.packing and config.packing_strategy != "wrapped":
        if not config.allow_leaking_packing:
            yield (
                "`eval_packing: true` without `packing: true`: TRL's collator then keeps no positions, and the "
                "packed sequences of the evaluation see each other in every model. Set `packing: true` too, or "
                "remove `eval_packing`."
            )


# Fields that one objective reads, with the defaults that are silent under the others.
_FIELDS_OF = {
    "akl": {"akl_mu": 0.5, "akl_head_rule": "paper"},
    "hpd": {"hpd_sample": True, "hpd_reinforce": True},
    "gopd": {
        "reward_scale": 1.0,
        "reference_model_name_or_path": None,
        "gopd_aggregation": "seq-mean-token-mean",
        "gopd_tis_cap": None,
        "gopd_logratio_clamp": None,
        "gopd_full_vocab": False,
        "gopd_teacher_column": None,
    },
}


def objective_rules(config: Any, beta: float) -> Iterator[str]:
    """Yields what is wrong with the fields that the distillation configs share; `beta` is the config's default."""
    if config.objective != "jsd" and config.beta != beta:
        yield (
            f"`beta: {config.beta}` acts on `objective: jsd` only, and the objective is {config.objective!r}. Remove "
            "`beta`, or set `objective: jsd`."
        )
    for objective, defaults in _FIELDS_OF.items():
        for name, default in defaults.items():
            value = getattr(config, name, default)
            if objective != config.objective and value != default:
                yield (
                    f"`{name}: {value}` acts on `objective: {objective}` only, and the objective is "
                    f"{config.objective!r}. Remove `{name}`, or set `objective: {objective}`."
                )
    if config.objective == "gopd":
        yield from _gopd_rules(config)


def _gopd_rules(config: Any) -> Iterator[str]:
    # Anything that makes the completions other than draws from the distribution that the loss is about.
    neutral = {
        "temperature": (1.0,),
        "top_p": (1.0,),
        "top_k": (0,),
        "min_p": (None, 0.0),
        "repetition_penalty": (1.0,),
    }
    for name, values in neutral.items():
        value = getattr(config, name, values[0])
        if value not in values:
            yield (
                f"`objective: gopd` needs `{name}: {values[0]}`: its loss is about the distribution that completions "
                f"are drawn from; got `{name}: {value}`."
            )
    overridden = getattr(config, "generation_kwargs", None) or {}
    for name in sorted({*neutral, "do_sample", "num_beams"} & {*overridden} if isinstance(overridden, dict) else ()):
        yield (
            f"`generation_kwargs: {{{name}: {overridden[name]}}}` replaces plain draws from the student, which "
            f"`objective: gopd` is about. Remove `{name}`."
        )
    if config.reward_scale == 1 and config.reference_model_name_or_path is not None:
        yield (
            "`reference_model_name_or_path` has no effect with `reward_scale: 1.0`, where the reference cancels. Set "
            "`reward_scale: 1.25` (the paper's value), or remove the reference."
        )
    for name in ("gopd_tis_cap", "gopd_logratio_clamp"):
        if config.gopd_full_vocab and getattr(config, name) is not None:
            yield (
                f"`{name}: {getattr(config, name)}` acts on sampled tokens, and `gopd_full_vocab: true` is about all "
                "of them. Remove one of the two."
            )
