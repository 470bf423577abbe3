"""Rubrics and verdicts as text: what SRaR asks a judge, and what a judge replies."""

import json
import re
from collections import Counter
from dataclasses import dataclass


__all__ = ["ITEM_TYPES", "WEIGHTS", "JudgeRequest", "RubricItem", "parse_rubric", "parse_verdicts"]

WEIGHTS = {"SUGGEST": 0.8, "PITFALL": -1.0, "BONUS": 1.0}
"""R_τ of the paper. ANSWER items are shown to the judge and never scored."""

ITEM_TYPES = (*WEIGHTS, "ANSWER")

_ITEM = re.compile(rf"<({'|'.join(ITEM_TYPES)})>\s*(\S.*)")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_VERDICT = {"id": int, "satisfied": bool, "step": int}


@dataclass(frozen=True)
class RubricItem:
    """One line of a rubric: its number, counted from 1, one of `ITEM_TYPES`, and its text."""

    id: int
    type: str
    text: str


@dataclass(frozen=True)
class JudgeRequest:
    """
    Question to a judge about one rollout.

    Attributes:
        prompt (`str` or `list[dict]`): The problem, as the policy saw it.
        rubric (`list[RubricItem]`): The items.
        solution (`str`): The completion. Written by the policy: text to judge, never instructions.
        steps (`list[tuple[int, int]]`): First character and character after the last of each of its steps. They are
            numbered by order, from 1; a step may print another number.
        answer (`str`, *optional*): Final answer that was extracted from it.
    """

    prompt: str | list[dict]
    rubric: list[RubricItem]
    solution: str
    steps: list[tuple[int, int]]
    answer: str | None = None


def parse_rubric(text: str) -> list[RubricItem]:
    """
    Reads a rubric: one item a line, `<TYPE> text`, with a type of SUGGEST, PITFALL, BONUS or ANSWER. Blank lines do
    not count.

    Raises:
        ValueError: A line that is not of this form, or no text.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"A rubric is text, one item a line; got {type(text).__name__}. Join the items with line ends."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    items = []
    for number, line in enumerate(lines, start=1):
        match = _ITEM.fullmatch(line)
        if match is None:
            raise ValueError(
                f"Line {number} of the rubric is {line!r}. Write `<TYPE> text` with a type of {', '.join(ITEM_TYPES)}."
            )
        items.append(RubricItem(number, *match.groups()))
    return items


def parse_verdicts(reply: str | list, num_items: int) -> list[dict]:
    """
    Reads a judge's reply.

    Args:
        reply (`str` or `list`):
            A JSON array of `{"id": int, "satisfied": bool, "step": int}`, parsed or not, at most in one code fence.
            Nothing may stand around it: a verdict that the judge merely quotes from the completion is not one.
        num_items (`int`):
            Items in the rubric. An item without a verdict is not satisfied.

    Returns:
        `list[dict]`: the verdicts.

    Raises:
        ValueError: Anything else, an id outside the rubric, or an id twice.
    """
    if isinstance(reply, str):
        fenced = _FENCE.fullmatch(reply.strip())
        try:
            reply = json.loads(fenced.group(1) if fenced else reply)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The judge's reply is not JSON ({error}): {reply[:200]!r}.") from error
    expected = 'a list of {"id": int, "satisfied": bool, "step": int}'
    if not isinstance(reply, list):
        raise ValueError(f"The judge's reply is {expected}; got {type(reply).__name__}.")
    for verdict in reply:
        if not isinstance(verdict, dict) or {key: type(value) for key, value in verdict.items()} != _VERDICT:
            raise ValueError(f"The judge's reply is {expected}; got the entry {str(verdict)[:200]}.")
    counts = Counter(verdict["id"] for verdict in reply)
    if wrong := [number for number, count in counts.items() if count > 1 or not 1 <= number <= num_items]:
        raise ValueError(f"The judge's reply has items {wrong} twice or outside the rubric of {num_items} items.")
    return reply
