"""The reward of a search agent: F1 of its answer, 0 if the rollout is not of the agreed form."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hf_rb.rl.answers import gold_answer
from hf_rb.rl.rewards import completion_text
from hf_rb.tiny.problems import extract_answer


__all__ = ["answer_f1", "is_tool_error", "is_well_formed", "search_f1", "text_of"]

_MARKUP = re.compile(r"</?tool_(call|response)>")
_SKIPPED = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def search_f1(
    completions: list,
    answer: Sequence[str | list[str]],
    log_metric: Callable[[str, float], None] | None = None,
    answer_extractor: Callable[[str], str | None] = extract_answer,
    **kwargs: Any,
) -> list[float]:
    """
    F1 of the answer, times whether the rollout is well formed, as CalibAdv is trained with
    (https://huggingface.co/papers/2604.18235).

    Args:
        completions (`list`):
            Message lists; a rollout that is a string never searched and scores 0.
        answer (`Sequence[str | list[str]]`):
            The right answer of each, or several: the best match counts.
        log_metric (`Callable[[str, float], None]`, *optional*):
            TRL's; gets `search/well_formed` and `search/f1`, the latter whatever the form.
        answer_extractor (`Callable[[str], str | None]`, *optional*):
            From a text to its answer. By default what follows the last `####`.

    Returns:
        `list[float]`: Rewards in `[0, 1]`.
    """
    formed = [is_well_formed(completion, answer_extractor) for completion in completions]
    answers = [answer_extractor(completion_text(completion)) for completion in completions]
    f1 = [answer_f1(given, gold) for given, gold in zip(answers, answer, strict=True)]
    if log_metric and formed:
        log_metric("search/well_formed", sum(formed) / len(formed))
        log_metric("search/f1", sum(f1) / len(f1))
    return [score * ok for score, ok in zip(f1, formed, strict=True)]


def is_well_formed(
    completion: str | list[dict], answer_extractor: Callable[[str], str | None] = extract_answer
) -> bool:
    """
    Returns whether a rollout searched at least once, without an error, and then answered: every assistant message but
    the last calls a tool, the last calls none and has an answer, and no message holds markup of calls that failed to
    parse.
    """
    if isinstance(completion, str) or not completion:
        return False
    assistant = [message for message in completion if message["role"] == "assistant"]
    tool = [message for message in completion if message["role"] == "tool"]
    return (
        bool(tool)
        and completion[-1]["role"] == "assistant"
        and all(message.get("tool_calls") for message in assistant[:-1])
        and not assistant[-1].get("tool_calls")
        and not any(is_tool_error(message) for message in tool)
        and not any(_MARKUP.search(text_of(message)) for message in assistant)
        and answer_extractor(text_of(assistant[-1])) is not None
    )


def is_tool_error(message: dict) -> bool:
    """Returns whether a tool message is what TRL writes when the call failed."""
    return text_of(message).startswith("{'error': ")


def text_of(message: dict) -> str:
    """Returns a message's text; content blocks are joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def answer_f1(answer: str | None, gold: str | float | None | Sequence[str]) -> float:
    """
    Returns the harmonic mean of precision and recall over words, without case, punctuation and articles, as SQuAD's
    evaluation defines it; the best one if there are several right answers.
    """
    golds = gold if isinstance(gold, Sequence) and not isinstance(gold, str) else [gold]
    return max((_f1(_words(answer or ""), _words(gold_answer(one) or "")) for one in golds), default=0.0)


def _words(text: str) -> list[str]:
    # As in SQuAD's evaluation: punctuation goes without leaving a blank, so that "U.S." is "US".
    return _SKIPPED.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(given: list[str], right: list[str]) -> float:
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right)) if common else 0.0
