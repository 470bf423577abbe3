"""The fields of `GRPOConfig` that say what a policy acts on and who judges its steps."""

from dataclasses import dataclass

from hf_rb.utils.fields import documented, flag


__all__ = ["AgentArguments"]


@documented
@dataclass
class AgentArguments:
    """
    Environment of the policy.
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
