"""Rules for the fields of `GRPOConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

from hf_rb.methods import ShaperMethod
from hf_rb.methods.registry import methods, name_problem
from hf_rb.methods.rules import flag_rules
from hf_rb.trainers.common.rules import trainer_methods, trainer_rules


__all__ = ["agent_rules", "grpo_recipe_rules", "grpo_rules", "grpo_warnings", "pipeline_line"]


def grpo_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`GRPOConfig`]."""
    names = config.advantage_shapers
    if isinstance(names, str):
        yield f"`advantage_shapers` is a list: write `advantage_shapers: [{names}]`."
        return
    yield from _name_rules(names)
    yield from flag_rules(config, "shaper", names, lambda shaper, field: _remedy(names, shaper, field))
    if config.correct_reward is None and config.correct_threshold != 0.5:
        yield (
            f"`correct_threshold: {config.correct_threshold}` has no effect without `correct_reward`. Set it, or "
            "remove the threshold."
        )
    yield from trainer_rules(config)


def _remedy(names: list[str], shaper: str, field: str) -> str:
    return (
        f"has no effect without the shaper {shaper!r}. Write `advantage_shapers: [{', '.join([*names, shaper])}]`, or "
        f"remove `{field}`."
    )


def _name_rules(names: list[str]) -> Iterator[str]:
    for problem in filter(None, (name_problem("shaper", name, "advantage_shapers") for name in names)):
        yield problem.replace("` cannot be", "` cannot hold")
    known = methods("shaper") if names else {}
    placed = [name for name in names if name in known]
    ordered = sorted(placed, key=lambda name: cast(ShaperMethod, known[name].method).stage)
    if len(set(names)) < len(names):
        yield f"`advantage_shapers: [{', '.join(names)}]` has a shaper twice. Each runs once."
    elif placed != ordered:
        yield (
            "Advantage shapers run in the order new advantages, sequence, token-wise factors, token-wise offsets. "
            f"Write `advantage_shapers: [{', '.join(ordered)}]` instead of [{', '.join(placed)}]."
        )


def grpo_recipe_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with a recipe, where nothing can be passed as an object."""
    known = methods("shaper")
    for name in config.advantage_shapers:
        yield from known[name].method.recipe_rules(config) if name in known else ()


def grpo_warnings(config: Any, token_shapers: bool | None = None) -> Iterator[str]:
    """
    Yields what acts otherwise than one may think with the fields of a [`GRPOConfig`].

    Args:
        config (`GRPOConfig`, or anything with its fields):
            The config.
        token_shapers (`bool`, *optional*):
            Whether a shaper makes advantages of tokens. By default it follows from `advantage_shapers`.
    """
    known = methods("shaper")
    active = [cast(ShaperMethod, known[name].method) for name in config.advantage_shapers if name in known]
    if token_shapers is None:
        token_shapers = any(method.level == "token" for method in active)
    if token_shapers:
        why = {
            "importance_sampling_level: sequence": config.importance_sampling_level == "sequence",
            "loss_type: vespo": config.loss_type == "vespo",
            "off_policy_mask_threshold": config.off_policy_mask_threshold is not None,
        }
        for name in (name for name, is_set in why.items() if is_set):
            yield (
                f"`{name}` is defined with one advantage a completion, and the shapers make one a token: what "
                "depends on its sign is decided token by token."
            )
    for method in (*active, *trainer_methods(config)):
        yield from method.warnings(config)


def pipeline_line(config: Any, names: Iterable[str] | None = None) -> str:
    """
    Says in one line what happens to the advantages, for the start of a run and for `hf-rb check`.

    Args:
        config (`GRPOConfig`, or anything with its fields):
            The config.
        names (`Iterable[str]`, *optional*):
            Shapers that run in place of `config.advantage_shapers`, in order. What the config says is not theirs.
    """
    stages = [f"GRPO over groups of {config.num_generations}", *(names or ())]
    for name in config.advantage_shapers if names is None else ():
        method = methods("shaper")[name].method
        # A base class of the flags says how a judge is reached, not what happens.
        own = {name: getattr(config, name) for name in getattr(method.flags, "__annotations__", {})}
        shown = ", ".join(
            f"{name.removeprefix(f'{method.key}_')} {one}" for name, one in own.items() if one is not None
        )
        stages.append(f"{name} ({shown})" if shown else name)
    stages.append(f"{config.loss_type} loss")
    if config.hidden_align_coef:
        stages[-1] += f" + {config.hidden_align_coef} hidden-align"
    return f"advantages: {' -> '.join(stages)}"


def agent_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of [`AgentArguments`]."""
    unknown = set(config.environment_kwargs or {}) - {"corpus", "top_k"}
    if config.environment_kwargs and config.environment is None:
        yield "`environment_kwargs` needs an environment: set `environment: search`."
    elif unknown:
        yield (
            f"`environment_kwargs` has {', '.join(sorted(unknown))}. `environment: search` knows `corpus` and `top_k`."
        )
    top_k = (config.environment_kwargs or {}).get("top_k")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        yield f"`environment_kwargs: {{top_k: {top_k}}}`: write a whole number of 1 or more."
