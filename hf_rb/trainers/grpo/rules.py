"""Rules for the fields of `GRPOConfig`, each of which yields what is wrong with them. Standard library only:
`hf-rb check` runs these without torch.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

from hf_rb.methods.registry import BUILT_IN, registered_shapers


__all__ = ["agent_rules", "grpo_rules", "grpo_warnings"]

# Fields that one shaper reads, or the auxiliary loss, with the defaults that are silent without it.
_FIELDS_OF_SHAPER = {
    "edas": {
        "edas_alpha": 0.4,
        "edas_beta": 0.3,
        "edas_kappa": 2.0,
        "edas_no_answer": "cluster",
        "edas_equivalence": "auto",
        "edas_warmup_start": 0,
        "edas_warmup_steps": 0,
        "edas_format_reward": None,
    },
    "calibadv": {
        "calibadv_soft": True,
        "calibadv_pos_neg_ratio": 1.0,
        "calibadv_max_gain": None,
        "calibadv_weighting": "token",
        "calibadv_qualify": 0.7,
        "calibadv_answer_must_not_call_tool": True,
    },
    "srar": {"srar_coef": 1.0, "srar_gk": "code", "srar_ddof": 1, "srar_eps": 1e-4, "srar_only_mixed": True},
}
_TOKEN_SHAPERS = ("calibadv", "srar")


def grpo_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of a [`GRPOConfig`]."""
    names = config.advantage_shapers
    if isinstance(names, str):
        yield f"`advantage_shapers` is a list: write `advantage_shapers: [{names}]`."
        return
    yield from _shaper_name_rules(names)
    for shaper, defaults in _FIELDS_OF_SHAPER.items():
        for name, default in defaults.items():
            if shaper not in names and getattr(config, name) != default:
                yield (
                    f"`{name}: {getattr(config, name)}` has no effect without the shaper {shaper!r}. Write "
                    f"`advantage_shapers: [{', '.join([*names, shaper])}]`, or remove `{name}`."
                )
    if "edas" in names and config.correct_reward is None:
        yield (
            "`advantage_shapers: [edas]` needs to know which completions are wrong. Set `correct_reward` to the name "
            "of a reward function, such as `correct_reward: exact_answer_reward`."
        )
    if config.hidden_align_coef > 0 and config.correct_reward is None:
        yield (
            f"`hidden_align_coef: {config.hidden_align_coef}` aligns correct completions. Set `correct_reward` to "
            "the name of the reward function that says which are."
        )
    if config.correct_reward is None and config.correct_threshold != 0.5:
        yield (
            f"`correct_threshold: {config.correct_threshold}` has no effect without `correct_reward`. Set it, or "
            "remove the threshold."
        )
    if config.hidden_align_marker == "":
        yield (
            "`hidden_align_marker` is empty, and a hidden state is taken before it. Write the text with which "
            "answers begin."
        )
    if "calibadv" in names:
        yield from _calibadv_rules(config)
    if "calibadv" in names and config.calibadv_pos_neg_ratio is not None:
        if config.multi_objective_aggregation == "normalize_then_sum":
            yield (
                "`multi_objective_aggregation: normalize_then_sum` centres advantages over the batch, and CalibAdv "
                "balances positive with negative ones in each group, which may have one kind only. Set "
                "`multi_objective_aggregation: sum_then_normalize`, or `calibadv_pos_neg_ratio: null`."
            )
    for name, default in (("hidden_align_marker", None), ("hidden_align_all_correct", False)):
        if config.hidden_align_coef == 0 and getattr(config, name) != default:
            yield (
                f"`{name}: {getattr(config, name)}` has no effect with `hidden_align_coef: 0.0`. Set the weight, or "
                "remove it."
            )


def _calibadv_rules(config: Any) -> Iterator[str]:
    """Fields of CalibAdv that another of its fields has switched off."""
    if not config.calibadv_soft and config.calibadv_pos_neg_ratio is None:
        yield (
            "`calibadv_soft: false` and `calibadv_pos_neg_ratio: null` leave CalibAdv nothing to do. Remove one of "
            "them, or `calibadv`."
        )
    without = {
        "calibadv_pos_neg_ratio: null": (
            config.calibadv_pos_neg_ratio is None,
            {"calibadv_max_gain": None, "calibadv_weighting": "token"},
        ),
        "calibadv_soft: false": (not config.calibadv_soft, {"calibadv_qualify": 0.7, "calibadv_step_field": None}),
        "calibadv_step_field": (config.calibadv_step_field is not None, {"calibadv_qualify": 0.7}),
    }
    for reason, (switched_off, fields) in without.items():
        for name, default in fields.items():
            if switched_off and getattr(config, name) != default:
                yield f"`{name}: {getattr(config, name)}` has no effect with `{reason}`. Remove one of the two."


def _shaper_name_rules(names: list[str]) -> Iterator[str]:
    known = registered_shapers() if names else {}
    for name in names:
        if name in known:
            continue
        if ":" in name:
            yield (
                f"`advantage_shapers` names code, {name!r}. Code in a recipe is imported only if the command line "
                f"says so too: add `--allow_local_code {name}` if you trust it."
            )
            continue
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(map(repr, known))}."
        yield f"`advantage_shapers` cannot hold {name!r}; {hint}"
    ours = [name for name in names if name in BUILT_IN]
    ordered = sorted(ours, key=list(BUILT_IN).index)
    if len(set(names)) < len(names):
        yield f"`advantage_shapers: [{', '.join(names)}]` has a shaper twice. Each runs once."
    elif ours != ordered:
        yield (
            "Advantage shapers run in the order sequence, token-wise factors, token-wise offsets. Write "
            f"`advantage_shapers: [{', '.join(ordered)}]` instead of [{', '.join(ours)}]."
        )


def grpo_warnings(config: Any, token_shapers: bool | None = None) -> Iterator[str]:
    """
    Yields what acts otherwise than one may think with the fields of a [`GRPOConfig`].

    Args:
        config (`GRPOConfig`, or anything with its fields):
            The config.
        token_shapers (`bool`, *optional*):
            Whether a shaper makes advantages of tokens. By default it follows from `advantage_shapers`.
    """
    if token_shapers is None:
        token_shapers = any(name in _TOKEN_SHAPERS for name in config.advantage_shapers)
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
    if "edas" in config.advantage_shapers and config.mask_truncated_completions and config.edas_no_answer == "cluster":
        yield (
            "`mask_truncated_completions` takes truncated completions out of the loss, and to EDAS they remain one "
            "error, that of no answer. `edas_no_answer: skip` leaves them out there too."
        )
    if (
        "calibadv" in config.advantage_shapers
        and config.calibadv_pos_neg_ratio is not None
        and config.calibadv_weighting == "token"
        and config.loss_type in ("grpo", "sapo")
    ):
        yield (
            f"`loss_type: {config.loss_type}` averages over the tokens of each completion first, and CalibAdv "
            "balances answers token by token, as in its paper's loss. `calibadv_weighting: loss` balances what this "
            "loss adds up."
        )
    once = config.steps_per_generation in (None, config.gradient_accumulation_steps)
    if config.hidden_align_coef > 0 and (config.num_iterations > 1 or not once):
        yield (
            "`hidden_align_coef` aligns with states of the policy that wrote the completions, and here it takes "
            "several steps on them: the gradient is exact in the first only."
        )


# Fields that act where an endpoint judges, with the defaults that are silent without one.
_JUDGE_FIELDS = {
    "srar_judge_model": None,
    "srar_judge_api_key_env": None,
    "srar_judge_timeout": 60.0,
    "srar_judge_retries": 2,
    "srar_judge_concurrency": 32,
    "srar_judge_kwargs": None,
}


def agent_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of [`AgentArguments`]. No message repeats what may be a key."""
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
    yield from _pattern_rules(config)
    yield from _judge_rules(config)
    acting = {"calibadv_step_field": "calibadv", "srar_judge": "srar", "srar_step_pattern": "srar"}
    for name, shaper in acting.items():
        if getattr(config, name) is not None and shaper not in config.advantage_shapers:
            yield f"`{name}` acts only with `{shaper}` in `advantage_shapers`. Add it there, or remove `{name}`."


def _pattern_rules(config: Any) -> Iterator[str]:
    try:
        re.compile(config.srar_step_pattern or "")
    except re.error as error:
        yield f"`srar_step_pattern: {config.srar_step_pattern}` is not a regular expression: {error}."


def _judge_rules(config: Any) -> Iterator[str]:
    judge = config.srar_judge
    is_url = judge is not None and judge.startswith(("http://", "https://"))
    if judge is not None and judge != "tiny" and not is_url:
        yield (
            f"`srar_judge` cannot be {judge!r}: write the base URL of an OpenAI-compatible endpoint, such as "
            "http://localhost:8000/v1, or `tiny`."
        )
    if is_url and (urlsplit(judge).username or urlsplit(judge).query):
        yield (
            "`srar_judge` holds a user name or a query. Write the bare base URL, and the name of the environment "
            "variable that holds the key as `srar_judge_api_key_env`."
        )
    if is_url and not config.srar_judge_model:
        yield "`srar_judge` is an endpoint: set `srar_judge_model` to the model that it serves."
    if not is_url:
        for name, default in _JUDGE_FIELDS.items():
            if getattr(config, name) != default:
                yield f"`{name}` acts only where `srar_judge` is the URL of an endpoint. Set it, or remove `{name}`."
    # By convention names are in capitals, and keys are not.
    if config.srar_judge_api_key_env and not re.fullmatch("[A-Z][A-Z0-9_]*", config.srar_judge_api_key_env):
        yield (
            "`srar_judge_api_key_env` is the name of an environment variable, such as JUDGE_API_KEY, in capitals. If "
            "a key stands there, take it out and revoke it."
        )
    if {"api_key", "authorization", "headers"} & {str(key).lower() for key in config.srar_judge_kwargs or {}}:
        yield (
            "`srar_judge_kwargs` is part of the request's body and no place for a key. Name the environment variable "
            "that holds it as `srar_judge_api_key_env`."
        )
