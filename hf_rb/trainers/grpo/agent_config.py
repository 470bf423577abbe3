"""The fields of `GRPOConfig` that say what a policy acts on and who judges its steps."""

from dataclasses import dataclass, field

from hf_rb.utils.fields import described


__all__ = ["AgentArguments"]


@dataclass
class AgentArguments:
    """
    Environment of the policy, and the judge of its steps.

    Args:
        environment (`str`, *optional*):
            What the policy may act on: `"search"`, a search tool over passages (`pip install 'hf_rb[rl]'`). The
            trainer's `environment_factory` takes any other.
        environment_kwargs (`dict`, *optional*):
            Of `environment="search"`: `corpus`, a JSONL file with `text` and, if there are, `id` and `title` in every
            line, or `tiny:facts` (the default); `top_k`, passages a search returns (3, of the facts 2).
        calibadv_step_field (`str`, *optional*):
            Field of the rollouts that holds the quality of each search step, as a `rollout_func` returns it. By
            default quality comes from silver documents.
        srar_step_pattern (`str`, *optional*):
            Regular expression that matches where a step begins. Defaults to headers such as `### Step 1:`.
        srar_judge (`str`, *optional*):
            Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or `"tiny"`,
            an offline judge for `tiny:math`. The trainer's `judge` takes any callable.
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
            "Of `environment: search`: `corpus`, a JSONL file with `text` and, if there are, `id` and `title` in "
            "every line, or `tiny:facts`; `top_k`, passages a search returns."
        ),
    )
    calibadv_step_field: str | None = field(
        default=None,
        metadata=described(
            "Field of the rollouts that holds the quality of each search step. By default it comes from silver "
            "documents."
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
            "Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or "
            "`tiny`, an offline judge for `tiny:math`."
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
            "More fields of the request to the judge, such as `max_tokens`. The temperature is 0 unless it is among "
            "them."
        ),
    )
