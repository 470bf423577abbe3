"""The fields of `GRPOConfig` that say what a policy acts on and who judges its steps."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from hf_rb.utils.fields import described


__all__ = ["AgentArguments", "agent_rules"]

_JUDGE_FIELDS = {
    "srar_judge_model": None,
    "srar_judge_api_key_env": None,
    "srar_judge_timeout": 60.0,
    "srar_judge_retries": 2,
    "srar_judge_concurrency": 32,
    "srar_judge_kwargs": None,
}


@dataclass
class AgentArguments:
    """
    What the policy acts on, and who judges its steps.

    Args:
        environment (`str`, *optional*):
            What the policy may act on: `"search"`, a search tool over passages (`pip install 'hf_rb[rl]'`). The trainer's
            `environment_factory` takes any other.
        environment_kwargs (`dict`, *optional*):
            Of `environment="search"`: `corpus`, a JSONL file with `text` and, if there are, `id` and `title` in every line, or
            `tiny:facts` (the default); `top_k`, passages a search returns (3, of the facts 2).
        calibadv_step_field (`str`, *optional*):
            Field of the rollouts that holds the quality of each search step, as a `rollout_func` returns it. By default
            quality comes from silver documents.
        srar_step_pattern (`str`, *optional*):
            Regular expression that matches where a step begins. Defaults to headers such as `### Step 1:`.
        srar_judge (`str`, *optional*):
            Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or `"tiny"`, an
            offline judge for `tiny:math`. The trainer's `judge` takes any callable.
        srar_judge_model (`str`, *optional*):
            Model that the endpoint serves.
        srar_judge_api_key_env (`str`, *optional*):
            Name of the environment variable that holds the endpoint's key. Never the key.
        srar_judge_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds an answer may take; above 0.
        srar_judge_retries (`int`, *optional*, defaults to `2`):
            Further attempts where one fails; 0 or more.
        srar_judge_concurrency (`int`, *optional*, defaults to `32`):
            Requests of one process that are open at a time; 1 or more.
        srar_judge_kwargs (`dict`, *optional*):
            More fields of the request, such as `max_tokens`. The temperature is 0 unless it is among them.
    """

    environment: str | None = field(
        default=None,
        metadata=described(
            "What the policy may act on: `search`, a search tool over passages (needs `pip install 'hf_rb[rl]'`).",
            choices=["search"],
        ),
    )
    environment_kwargs: dict | str | None = field(
        default=None,
        metadata=described(
            "Of `environment: search`: `corpus`, a JSONL file with `text` and, if there are, `id` and `title` in every line, or "
            "`tiny:facts`; `top_k`, passages a search returns."
        ),
    )
    calibadv_step_field: str | None = field(
        default=None,
        metadata=described(
            "Field of the rollouts that holds the quality of each search step. By default it comes from silver documents."
        ),
    )
    srar_step_pattern: str | None = field(
        default=None,
        metadata=described(
            "Regular expression that matches where a step begins. Defaults to headers such as `### Step 1:`."
        ),
    )
    srar_judge: str | None = field(
        default=None,
        metadata=described(
            "Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or `tiny`, an offline "
            "judge for `tiny:math`."
        ),
    )
    srar_judge_model: str | None = field(
        default=None, metadata=described("Model that the endpoint of `srar_judge` serves.")
    )
    srar_judge_api_key_env: str | None = field(
        default=None,
        metadata=described("Name of the environment variable that holds the key of `srar_judge`. Never the key."),
    )
    srar_judge_timeout: float = field(
        default=60.0, metadata=described("Seconds an answer of the judge may take.", range="(0, inf)")
    )
    srar_judge_retries: int = field(
        default=2, metadata=described("Further attempts where a request to the judge fails.", range="[0, inf)")
    )
    srar_judge_concurrency: int = field(
        default=32,
        metadata=described("Requests to the judge that one process keeps open at a time.", range="[1, inf)"),
    )
    srar_judge_kwargs: dict | str | None = field(
        default=None,
        metadata=described(
            "More fields of the request to the judge, such as `max_tokens`. The temperature is 0 unless it is among them."
        ),
    )


def agent_rules(config: Any) -> Iterator[str]:
    """Yields what is wrong with the fields of [`AgentArguments`]. No message repeats what may be a key."""
    unknown = set(config.environment_kwargs or {}) - {"corpus", "top_k"}
    if config.environment_kwargs and config.environment is None:
        yield "`environment_kwargs` needs an environment: set `environment: search`."
    elif unknown:
        yield f"`environment_kwargs` has {', '.join(sorted(unknown))}. `environment: search` knows `corpus` and `top_k`."
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
            "`srar_judge` holds a user name or a query. Write the bare base URL, and the name of the environment variable that "
            "holds the key as `srar_judge_api_key_env`."
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
            "`srar_judge_api_key_env` is the name of an environment variable, such as JUDGE_API_KEY, in capitals. If a key "
            "stands there, take it out and revoke it."
        )
    if {"api_key", "authorization", "headers"} & {str(key).lower() for key in config.srar_judge_kwargs or {}}:
        yield (
            "`srar_judge_kwargs` is part of the request's body and no place for a key. Name the environment variable that holds "
            "it as `srar_judge_api_key_env`."
        )
