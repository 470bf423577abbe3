"""Rubrics and verdicts as text: what SRaR asks a judge, and what a judge replies."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from hf_rb.methods import flag


__all__ = [
    "ITEM_TYPES",
    "WEIGHTS",
    "JudgeFlags",
    "JudgeRequest",
    "RubricItem",
    "judge_rules",
    "parse_rubric",
    "parse_verdicts",
]

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


@dataclass
class JudgeFlags:
    """Flags of the way to a judge of steps."""

    srar_judge_api_key_env: str | None = flag(
        None, "Name of the environment variable that holds the key of `srar_judge`. Never the key.", secret=True
    )
    srar_judge_timeout: float = flag(60.0, "Seconds an answer of the judge may take.", range="(0, inf)")
    srar_judge_retries: int = flag(2, "Further attempts where a request to the judge fails.", range="[0, inf)")
    srar_judge_concurrency: int = flag(
        32, "Requests to the judge that one process keeps open at a time.", range="[1, inf)"
    )
    srar_judge_kwargs: dict | str | None = flag(
        None,
        "More fields of the request to the judge, such as `max_tokens`. The temperature is 0 unless it is among them.",
        secret=True,
    )


def judge_rules(config: Any) -> Iterator[str]:
    """Yields what keeps a config from reaching its judge. No message repeats what may be a key."""
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
        for name in ("srar_judge_model", *(one.name for one in fields(JudgeFlags))):
            if getattr(config, name) != getattr(JudgeFlags, name, None):
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
