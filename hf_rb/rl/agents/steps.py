"""Usefulness of each search of a rollout, which CalibAdv asks of the domain.

A step scorer takes the context of the advantage pipeline and returns, for each of this process's rollouts, one number
in [0, 1] for each model turn that calls a tool. Every process calls it.
"""

import math
from collections.abc import Callable

from hf_rb.advantages.pipeline import Requires, ShapingContext
from hf_rb.advantages.search_steps import silver_documents, step_quality
from hf_rb.rl.agents.rewards import is_tool_error, is_well_formed, text_of


__all__ = ["FieldScores", "SilverDocuments", "search_steps"]


class SilverDocuments:
    """
    Quality by silver documents: the share of what a search found that is new to the rollout and was also found by the
    best rollouts of its group (https://huggingface.co/papers/2604.18235). No judge, no labels.

    Documents are told apart by the ids in the environment's `retrieved` (`dict[str, list[str]]`, by the text of the
    tool message) or, without one, by the lines of the tool messages.

    Args:
        qualify (`float`, *optional*, defaults to `0.7`):
            Reward from which on a rollout can give silver documents.
        reward (`str`, *optional*):
            Name of the reward function that says so. May be left out if there is only one.
        well_formed (`Callable[[str | list[dict]], bool]`, *optional*, defaults to [`~agents.rewards.is_well_formed`]):
            Which completions have the right form: the others give no silver documents, and their steps score 0.
    """

    def __init__(
        self,
        qualify: float = 0.7,
        reward: str | None = None,
        well_formed: Callable[[str | list[dict]], bool] = is_well_formed,
    ):
        self.qualify, self.reward, self.well_formed = qualify, reward, well_formed
        self.requires = Requires(rewards=(reward,) if reward else (), tools=True, one_reward=reward is None)

    def __call__(self, ctx: ShapingContext) -> list[list[float]]:
        """Returns the quality of each search step.

        Raises:
            ValueError: There are several reward functions and `reward` names none of them.
        """
        environments = ctx.environments or [None] * len(ctx.completions)
        steps = [search_steps(*pair) for pair in zip(ctx.completions, environments, strict=True)]
        documents = [[found for _, found in rollout] for rollout in steps]
        formed = [self.well_formed(completion) for completion in ctx.completions]
        everywhere = ctx.gather(list(zip(documents, formed, strict=True)))

        rewards = [reward if ok else math.nan for reward, (_, ok) in zip(self._rewards(ctx), everywhere, strict=True)]
        silver = silver_documents(rewards, [found for found, _ in everywhere], ctx.group_size, self.qualify)
        first = ctx.local.start or 0
        return [
            step_quality(found, silver[(first + row) // ctx.group_size], [thought for thought, _ in rollout])
            if ok
            else [0.0] * len(found)
            for row, (rollout, found, ok) in enumerate(zip(steps, documents, formed, strict=True))
        ]

    def _rewards(self, ctx: ShapingContext) -> list[float]:
        if self.reward is None and len(ctx.reward_names) > 1:
            raise ValueError(
                "Silver documents come from the rollouts with the best reward, and there are several reward "
                f"functions. Set `correct_reward` to one of {', '.join(ctx.reward_names)}."
            )
        return ctx.reward(self.reward or ctx.reward_names[0]).tolist()


class FieldScores:
    """
    Quality that the rollouts bring along: a field that a `rollout_func` returned, or a dataset column.

    Args:
        field (`str`):
            Its name. One list of numbers in `[0, 1]` a rollout.
    """

    def __init__(self, field: str):
        self.field = field
        self.requires = Requires(columns=(field,))

    def __call__(self, ctx: ShapingContext) -> list[list[float]]:
        """Returns the quality of each search step.

        Raises:
            ValueError: A row lacks the field, or holds something else than numbers in `[0, 1]`.
        """
        scores = []
        for row in ctx.rows:
            if self.field not in row:
                raise ValueError(
                    f"`calibadv_step_field: {self.field}` names a field that the rollouts do not have: return it from "
                    f"`rollout_func`. They have {', '.join(map(repr, row))}."
                )
            given = row[self.field]
            if not isinstance(given, (list, tuple)) or not all(map(_is_quality, given)):
                raise ValueError(
                    f"`{self.field}` must hold one number between 0 and 1 for each search step; got {given!r}."
                )
            scores.append([float(q) for q in given])
        return scores


def _is_quality(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1


def search_steps(completion: str | list[dict], environment: object = None) -> list[tuple[str, list[str]]]:
    """
    Returns what happened at each model turn that called a tool.

    Args:
        completion (`str` or `list[dict]`):
            Messages. A string has no steps.
        environment (`Any`, *optional*):
            With `retrieved`, document ids by the text of a tool message. Without, each line is a document.

    Returns:
        `list[tuple[str, list[str]]]`: what the model thought or said before the call, and the documents that all calls
        of the turn found; none for a failed call.
    """
    retrieved = getattr(environment, "retrieved", None)
    steps: list[tuple[str, list[str]]] = []
    for message in [] if isinstance(completion, str) else completion:
        if message["role"] == "assistant" and message.get("tool_calls"):
            # Where a template marks thoughts, TRL parses them into a field of their own.
            thought = message.get("reasoning_content") or message.get("thinking") or ""
            steps.append((f"{thought} {text_of(message)}".strip(), []))
        elif message["role"] == "tool" and steps and not is_tool_error(message):
            text = text_of(message)
            found = [line for line in map(str.strip, text.splitlines()) if line]
            steps[-1][1].extend(found if retrieved is None else retrieved.get(text, []))
    return steps
