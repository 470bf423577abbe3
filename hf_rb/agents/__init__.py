"""Agents: environments whose methods are a policy's tools, the reward of a search, and the quality of its steps."""

from collections.abc import Callable
from typing import Any


__all__ = ["environment_factory", "step_scorer"]


def environment_factory(args: Any) -> Callable | None:
    """
    Returns what TRL's `environment_factory` takes, as a config names it.

    Args:
        args (`GRPOConfig`):
            With `environment` and `environment_kwargs`.

    Raises:
        ImportError, OSError, ValueError: `bm25s` is not installed; the corpus is not there; it is not one.
    """
    if args.environment is None:
        return None
    from hf_rb.agents.search import search_environment

    return search_environment(**(args.environment_kwargs or {}))


def step_scorer(args: Any) -> Callable:
    """
    Returns what says how useful each search step was, as a config names it.

    Args:
        args (`GRPOConfig`):
            With `calibadv_step_field`, `calibadv_qualify` and `correct_reward`.
    """
    from hf_rb.agents.steps import FieldScores, SilverDocuments

    if args.calibadv_step_field is not None:
        return FieldScores(args.calibadv_step_field)
    return SilverDocuments(args.calibadv_qualify, args.correct_reward)
