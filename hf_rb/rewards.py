r"""Reward functions for [`GRPOTrainer`] that a recipe names, and where the final answer of a completion is.

`reward_funcs: [exact_answer_reward, answer_format_reward]` names them, as it names TRL's. All find the answer with the
recipe's `answer_extractor`:

    boxed    the content of the last \boxed{}, braces balanced
    hashes   the rest of the line after the last ####
    tag      the content of the last <answer></answer>

A completion is a string or a list of messages. Of messages only the last counts, and only if the model wrote it: an agent that
was cut off after a tool's response has no answer.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hf_rb._shapers import LOCAL
from hf_rb.tiny.problems import extract_answer


__all__ = [
    "EXTRACTORS",
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
    "step_format_reward",
    "tagged_answer",
]

Extractor = Callable[[str], str | None]


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Returns what the model wrote last: the completion itself, or the text of its last message if that is the assistant's."""
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1]["role"] != "assistant":
        return ""
    content = completion[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def boxed_answer(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, or `None` where there is none or it is not closed."""
    _, marker, rest = text.rpartition(r"\boxed{")
    depth = 1
    for index, character in enumerate(rest if marker else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:index].strip() or None
    return None


def tagged_answer(text: str) -> str | None:
    """Returns the content of the last `<answer>...</answer>`, or `None` where there is none or it is not closed."""
    _, marker, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() or None if marker and closed else None


EXTRACTORS: dict[str, Extractor] = {"boxed": boxed_answer, "hashes": extract_answer, "tag": tagged_answer}
MARKERS = {"boxed": r"\boxed", "hashes": "####", "tag": "<answer>"}
"""The text with which the answer of each extractor begins."""


def exact_answer_reward(
    completions: list, answer: list[str], answer_extractor: Extractor = boxed_answer, **kwargs: Any
) -> list[float]:
    """
    Returns 1.0 for every completion whose answer is that of the dataset, else 0.0. Blanks around it and case do not count.

    Args:
        completions (`list` of `str` or of message lists):
            Completions.
        answer (`list[str]`):
            Dataset column: the right answers, or texts that end in them, such as worked solutions.
        answer_extractor (`Callable`, *optional*):
            From a text to its answer or `None`.
        **kwargs:
            What else a trainer passes.
    """
    return [
        float(_normal(answer_extractor(completion_text(completion))) == _normal(answer_extractor(gold) or gold))
        for completion, gold in zip(completions, map(str, answer), strict=True)
    ]


def math_accuracy_reward(
    completions: list, solution: list[str], answer_extractor: Extractor = boxed_answer, **kwargs: Any
) -> list[float | None]:
    """
    Returns 1.0 for every completion whose answer `math-verify` finds equal to the solution, else 0.0; `None` where it cannot read
    the solution. Other than TRL's `accuracy_reward` it takes strings and agents' conversations too.

    Args:
        completions (`list` of `str` or of message lists):
            Completions.
        solution (`list[str]`):
            Dataset column: the right answers, or texts that end in them.
        answer_extractor (`Callable`, *optional*):
            From a text to its answer or `None`.
        **kwargs:
            What else a trainer passes.

    Raises:
        ImportError: `math-verify` is not installed.
    """
    require_math_verify("math_accuracy_reward")
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        gold = answer_extractor(gold) or gold
        if not _parsed(gold):
            rewards.append(None)
            continue
        answer = answer_extractor(completion_text(completion))
        rewards.append(float(answer is not None and _verified(gold, answer)))
    return rewards


def answer_format_reward(completions: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any) -> list[float]:
    """Returns 1.0 for every completion in which there is an answer, right or wrong, else 0.0."""
    return [float(answer_extractor(completion_text(completion)) is not None) for completion in completions]


def step_format_reward(completions: list, answer_extractor: Extractor = boxed_answer, **kwargs: Any) -> list[float]:
    """
    Returns 1.0 for every completion with at least one `### Step N:` header and an answer, right or wrong, else 0.0: the format
    that SRaR asks for (https://huggingface.co/papers/2605.17291).
    """
    from hf_rb.advantages.srar import STEP_HEADER

    texts = map(completion_text, completions)
    return [float(STEP_HEADER.search(text) is not None and answer_extractor(text) is not None) for text in texts]


def math_equivalent(first: str, second: str) -> bool:
    """Returns whether `math-verify` finds two answers equal with either of them as the gold one; what it cannot read is different."""
    return _verified(first, second) or _verified(second, first)


def require_math_verify(what: str) -> None:
    """
    Raises before training what would be found out in it.

    Raises:
        ImportError: `math-verify` is not installed.
    """
    if find_spec("math_verify") is None:
        raise ImportError(f"`{what}` needs math-verify. Run `pip install 'hf_rb[math]'`.")


def _normal(answer: str | None) -> str | None:
    return None if answer is None else answer.strip().lower()


# The same answers come again and again, within a group and over a run.
@lru_cache(maxsize=65536)
def _parsed(answer: str) -> tuple:
    from math_verify import parse

    # What a model wrote can break a parser of LaTeX in any way; timeouts take a signal, which only the main thread may use.
    try:
        return tuple(parse(f"${answer}$", parsing_timeout=_timeout(5)))
    except Exception:
        return ()


@lru_cache(maxsize=65536)
def _verified(gold: str, answer: str) -> bool:
    from math_verify import verify

    parsed, other = _parsed(gold), _parsed(answer)
    try:
        return bool(parsed and other and verify([*parsed], [*other], timeout_seconds=_timeout(5)))
    except Exception:
        return False


def _timeout(seconds: int) -> int | None:
    import threading

    return seconds if threading.current_thread() is threading.main_thread() else None


# Name in a recipe -> where it is. What is ours takes `answer_extractor`.
REWARDS = {
    "exact_answer_reward": "hf_rb.rewards:exact_answer_reward",
    "math_accuracy_reward": "hf_rb.rewards:math_accuracy_reward",
    "answer_format_reward": "hf_rb.rewards:answer_format_reward",
    "step_format_reward": "hf_rb.rewards:step_format_reward",
    "search_f1": "hf_rb.agents.rewards:search_f1",
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}


_OURS = {name for name, where in REWARDS.items() if where.startswith("hf_rb.")}


def reward_problem(name: str) -> str | None:
    """Returns why a recipe may not name this reward function, or `None`. Imports nothing."""
    if name in REWARDS or name in LOCAL:
        return None
    if ":" in name:
        return (
            f"`reward_funcs` names code, {name!r}. Code in a recipe is imported only if the command line says so too: add "
            f"`--allow_local_code {name}` if you trust it."
        )
    if "." in name:
        name = ":".join(name.rsplit(".", 1))
        return f"Code in a recipe is written `{name}`, and imported only if the command line has `--allow_local_code {name}`."
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
