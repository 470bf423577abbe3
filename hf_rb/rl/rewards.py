r"""Reward functions for [`GRPOTrainer`] that a recipe names, and where the final answer of a completion is.

`reward_funcs: [exact_answer_reward, answer_format_reward]` names them, as it names TRL's. All find the answer with the
recipe's `answer_extractor`, and compare it as `hf_rb.rl.answers` says, which `hf-rb eval` does too:

    boxed    the content of the last \boxed{} or \fbox{}, braces balanced
    hashes   the rest of the line after the last ####
    tag      the content of the last <answer></answer>

A completion is a string or a list of messages. Of messages only the last counts, and only if the model wrote it: an
agent that was cut off after a tool's response has no answer.
"""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from hf_rb.methods.registry import LOCAL
from hf_rb.rl.answers import gold_answer, is_readable, math_equivalent, require_math_verify, same_answer
from hf_rb.tiny.problems import extract_answer


__all__ = [
    "EXTRACTORS",
    "GOLD_COLUMNS",
    "MARKERS",
    "REWARDS",
    "answer_format_reward",
    "boxed_answer",
    "build_reward",
    "completion_text",
    "exact_answer_reward",
    "math_accuracy_reward",
    "math_equivalent",
    "reward_problem",
    "require_math_verify",
    "reward_name",
    "step_format_reward",
    "tagged_answer",
]

Extractor = Callable[[str], str | None]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Returns what the model wrote last: the completion itself, or the text of its last message if that is the
    assistant's.
    """
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1]["role"] != "assistant":
        return ""
    content = completion[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


# Without braces only what looks like mathematics is in the box, not the next word of a sentence about boxes.
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])(?:\s*(?=\{)|[ \t]*(?=[-+]?\.?\d|[-+]?\\[A-Za-z]|[-+]?[A-Za-z]\s*(?:\$|\Z)))"
)


def boxed_answer(text: str) -> str | None:
    r"""
    Returns the content of the last `\boxed{...}` or `\fbox{...}`, or `None` where there is none or it is not closed.
    `\{` and `\}` are signs and no braces. Of `\boxed 5`, without braces, the content ends at the next blank or dollar
    sign.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 0
    is_braced = text[start] == "{"
    for match in re.finditer(r"\\.|[{}\s$]", text[start:], re.DOTALL):
        sign, place = match.group(), start + match.start()
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if is_braced and depth == 0 and sign == "}":
            return text[start + 1 : place].strip() or None
        if not is_braced and (depth < 0 or (depth == 0 and sign in (" ", "\t", "\n", "$"))):
            return text[start:place].rstrip(".,;:") or None
    return None if is_braced or depth > 0 else text[start:].rstrip(".,;:") or None


def tagged_answer(text: str) -> str | None:
    """Returns the content of the last `<answer>...</answer>`, or `None` where there is none or it is not closed."""
    _, marker, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() or None if marker and closed else None


EXTRACTORS: dict[str, Extractor] = {"boxed": boxed_answer, "hashes": extract_answer, "tag": tagged_answer}
MARKERS = {"boxed": r"\boxed", "hashes": "####", "tag": "<answer>"}
"""The text with which the answer of each extractor begins."""


def exact_answer_reward(
    completions: list, answer: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any
) -> list[float | None]:
    """
    Returns 1.0 for every completion whose answer is that of the dataset, else 0.0; `None` where the dataset has none.
    Texts are the same up to case and blanks around them, numbers as numbers, and all else as `math-verify` finds where
    it is installed: see `hf_rb.rl.answers`.

    Args:
        completions (`list` of `str` or of message lists):
            Completions.
        answer (`list` of `str`, numbers or `None`):
            Dataset column: the right answers, or texts that end in them, such as worked solutions.
        answer_extractor (`Callable`, *optional*):
            From a text to its answer or `None`.
        **kwargs:
            What else a trainer passes.

    Raises:
        TypeError: An answer of the dataset is neither text nor number.
    """
    golds = [_gold(one, answer_extractor) for one in answer]
    return [
        None if gold is None else float(same_answer(answer_extractor(completion_text(completion)), gold))
        for completion, gold in zip(completions, golds, strict=True)
    ]


def math_accuracy_reward(
    completions: list, solution: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any
) -> list[float | None]:
    """
    As [`exact_answer_reward`], and never without `math-verify`. Other than TRL's `accuracy_reward` it takes strings
    and agents' conversations too.

    Args:
        completions (`list` of `str` or of message lists):
            Completions.
        solution (`list` of `str`, numbers or `None`):
            Dataset column: the right answers, or texts that end in them.
        answer_extractor (`Callable`, *optional*):
            From a text to its answer or `None`.
        **kwargs:
            What else a trainer passes.

    Returns:
        `list[float | None]`: 1.0 or 0.0; `None` where there is no solution, or one that differs and that `math-verify`
        cannot read.

    Raises:
        ImportError: `math-verify` is not installed.
        RuntimeError: Its process cannot be started.
        TypeError: A solution is neither text nor number.
    """
    require_math_verify("math_accuracy_reward")
    rewards = exact_answer_reward(completions, solution, answer_extractor)
    golds = [_gold(one, answer_extractor) for one in solution]
    return [
        reward if reward or gold is None or is_readable(gold) else None
        for reward, gold in zip(rewards, golds, strict=True)
    ]


def _gold(value: Any, answer_extractor: Extractor) -> str | None:
    gold = gold_answer(value)
    return gold and (answer_extractor(gold) or gold)


def answer_format_reward(completions: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any) -> list[float]:
    """Returns 1.0 for every completion in which there is an answer, right or wrong, else 0.0."""
    return [float(answer_extractor(completion_text(completion)) is not None) for completion in completions]


def step_format_reward(completions: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any) -> list[float]:
    """
    Returns 1.0 for every completion with at least one `### Step N:` header and an answer, right or wrong, else 0.0:
    the format that SRaR asks for (https://huggingface.co/papers/2605.17291).
    """
    from hf_rb.advantages.solution_steps import STEP_HEADER

    texts = map(completion_text, completions)
    return [float(STEP_HEADER.search(text) is not None and answer_extractor(text) is not None) for text in texts]


# Name in a recipe -> where it is. What is ours takes `answer_extractor`.
REWARDS = {
    "exact_answer_reward": "hf_rb.rl.rewards:exact_answer_reward",
    "math_accuracy_reward": "hf_rb.rl.rewards:math_accuracy_reward",
    "answer_format_reward": "hf_rb.rl.rewards:answer_format_reward",
    "step_format_reward": "hf_rb.rl.rewards:step_format_reward",
    "search_f1": "hf_rb.rl.agents.rewards:search_f1",
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}


GOLD_COLUMNS = {exact_answer_reward: "answer", math_accuracy_reward: "solution"}
"""Dataset columns of right answers, by the function that reads them."""

_OURS = {name for name, where in REWARDS.items() if where.startswith("hf_rb.")}


def reward_problem(name: str) -> str | None:
    """Returns why a recipe may not name this reward function, or `None`. Imports nothing."""
    if name in REWARDS or name in LOCAL:
        return None
    if ":" in name:
        return (
            f"`reward_funcs` names code, {name!r}. Code in a recipe is imported only if the command line says so "
            f"too: add `--allow_local_code {name}` if you trust it."
        )
    if "." in name:
        name = ":".join(name.rsplit(".", 1))
        return (
            f"Code in a recipe is written `{name}`, and imported only if the command line has `--allow_local_code "
            f"{name}`."
        )
    close = get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it must be one of {', '.join(map(repr, REWARDS))}."
    return f"`reward_funcs` cannot hold {name!r}; {hint}"


def reward_name(name: str) -> str:
    """Returns the name under which a trainer knows a reward function that a recipe names."""
    return name.rpartition(":")[2]


def build_reward(name: str, answer_extractor: str = "boxed") -> Callable:
    """
    Returns the reward function that a recipe names.

    Args:
        name (`str`):
            A key of `REWARDS`, or `module:attribute`, which is imported.
        answer_extractor (`str`, *optional*, defaults to `"boxed"`):
            A key of `EXTRACTORS`, for our own functions.

    Raises:
        ImportError, AttributeError: It is not there, or needs a package that is not.
    """
    if name == "math_accuracy_reward":
        require_math_verify(name)
    module, _, attribute = REWARDS.get(name, name).partition(":")
    function = getattr(import_module(module), attribute)
    return partial(function, answer_extractor=EXTRACTORS[answer_extractor]) if name in _OURS else function
