"""The fields of `GRPOConfig` that say what a policy acts on and who judges its steps."""

from dataclasses import dataclass

from hf_rb.utils.fields import documented, flag


__all__ = ["AgentArguments"]


@documented
@dataclass
class AgentArguments:
    """
    What the policy acts on, and who judges its steps.
    """

    environment: str | None = flag(
        None,
        "What the policy may act on: `search`, a search tool over passages (`pip install 'hf_rb[rl]'`). The "
        "trainer's `environment_factory` takes any other.",
        choices=["search"],
    )
    environment_kwargs: dict | str | None = flag(
        None,
        'Of `environment="search"`: `corpus`, a JSONL file with `text` and, if there are, `id` and `title` in '
        "every line, or `tiny:facts` (the default); `top_k`, passages a search returns (3, of the facts 2).",
    )
    calibadv_step_field: str | None = flag(
        None,
        "Field of the rollouts that holds the quality of each search step, as a `rollout_func` returns it. By "
        "default quality comes from silver documents.",
    )
    srar_step_pattern: str | None = flag(
        None, "Regular expression that matches where a step begins. Defaults to headers such as `### Step 1:`."
    )
    srar_judge: str | None = flag(
        None,
        "Who judges steps: the base URL of an OpenAI-compatible endpoint (`http://localhost:8000/v1`), or `tiny`, "
        "an offline judge for `tiny:math`. The trainer's `judge` takes any callable.",
    )
    srar_judge_model: str | None = flag(None, "Model that the endpoint of `srar_judge` serves.")
    srar_judge_api_key_env: str | None = flag(
        None, "Name of the environment variable that holds the key of `srar_judge`. Never the key."
    )
    srar_judge_timeout: float = flag(60.0, "Seconds an answer of the judge may take.", range="(0, inf)")
    srar_judge_retries: int = flag(2, "Further attempts where a request to the judge fails.", range="[0, inf)")
    srar_judge_concurrency: int = flag(
        32, "Requests to the judge that one process keeps open at a time.", range="[1, inf)"
    )
    srar_judge_kwargs: dict | str | None = flag(
        None,
        "More fields of the request to the judge, such as `max_tokens`. The temperature is 0 unless it is among them.",
    )
