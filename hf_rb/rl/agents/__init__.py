"""Agents: environments whose methods are a policy's tools, the reward of a search, and the quality of its steps."""

from collections.abc import Callable
from functools import partial
from typing import Any


__all__ = ["environment_factory", "step_scorer"]


def environment_factory(args: Any) -> Callable | None:
    """
    Returns what TRL's `environment_factory` takes, as a config names it.

    Args:
        args (`GRPOConfig`):
            With `environment`, `environment_kwargs` and `answer_extractor`.

    Raises:
        ImportError, OSError, ValueError: `bm25s` is not installed; the corpus is not there; it is not one.
    """
    if args.environment is None:
        return None
    from hf_rb.rl.agents.search import search_environment

    return search_environment(**(args.environment_kwargs or {}), answer_extractor=args.answer_extractor)


def step_scorer(args: Any) -> Callable:
    """
    Returns what says how useful each search step was, as a config names it.

    Args:
        args (`GRPOConfig`):
            With `calibadv_step_field`, `calibadv_qualify`, `correct_reward` and `answer_extractor`.
    """
    from hf_rb.rl.agents.rewards import is_well_formed
    from hf_rb.rl.agents.steps import FieldScores, SilverDocuments
    from hf_rb.rl.rewards import EXTRACTORS

    if args.calibadv_step_field is not None:
        return FieldScores(args.calibadv_step_field)
    well_formed = partial(is_well_formed, answer_extractor=EXTRACTORS[args.answer_extractor])
    return SilverDocuments(args.calibadv_qualify, args.correct_reward, well_formed)
