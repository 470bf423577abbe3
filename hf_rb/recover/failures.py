"""Problems that quantization has broken, and the repair set that is made of them."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_rb.evaluation import ExactMatch, solutions
from hf_rb.utils.special_tokens import cut, special_tokens


__all__ = [
    "Answers",
    "Comparison",
    "check_apart",
    "compare_failures",
    "digest",
    "lines",
    "problem_rows",
    "prompts",
    "repair_set",
    "text_rows",
]

SHORTEST = 50  # letters of a line of text that two texts have in common by more than chance


@dataclass(frozen=True)
class Answers:
    """
    Answers of two models to one problem.

    Attributes:
        prompt (`list[dict]`): The conversation.
        answer (`str`): The right answer.
        kind (`str`): Kind of the problem.
        before, after (`str`): What the two models write.
        right_before, right_after (`bool`): Whether that is right.
    """

    prompt: list[dict[str, str]]
    answer: str
    kind: str
    before: str
    after: str
    right_before: bool
    right_after: bool


@dataclass(frozen=True)
class Comparison:
    """
    Problems by what became of them.

    Attributes:
        flipped (`list[Answers]`): Right before, wrong after: the failing region.
        kept (`list[Answers]`): Right before and after.
        gained (`list[Answers]`): Wrong before, right after.
        failed (`list[Answers]`): Wrong before and after.
    """

    flipped: list[Answers]
    kept: list[Answers]
    gained: list[Answers]
    failed: list[Answers]

    def summary(self) -> dict[str, Any]:
        """Numbers of problems, of the flipped ones by kind too."""
        counts = {name: len(problems) for name, problems in vars(self).items()}
        kinds = Counter(problem.kind for problem in self.flipped)
        return counts | {"flipped_by_kind": dict(sorted(kinds.items()))}

    def rows(self) -> list[dict[str, Any]]:
        """All problems, what was flipped first."""
        return [{"outcome": name, **asdict(one)} for name, problems in vars(self).items() for one in problems]


def compare_failures(problems: Sequence[Mapping[str, Any]], before: ExactMatch, after: ExactMatch) -> Comparison:
    """
    Says which problems a model got right before something was done to it, and wrong after.

    Args:
        problems (`Sequence[Mapping]`):
            Rows with `prompt`, `answer` and `kind`, as [`~hf_rb.evaluation.load_task`] gives them.
        before, after ([`~hf_rb.evaluation.ExactMatch`]):
            Results of both models on these problems.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: The results are of other numbers of problems.

    Example:

    ```python
    >>> problems = load_task("tiny:math", 100)
    >>> results = [exact_match(model, tokenizer, problems) for model in (full, quantized)]
    >>> for problem in compare_failures(problems, *results).flipped:
    ...     print(problem.before, problem.after)
    ```
    """
    if not len(problems) == before.count == after.count:
        raise ValueError(
            f"There are {len(problems)} problems and results of {before.count} and {after.count}: solve the same "
            "ones with both."
        )
    groups: dict[tuple[bool, bool], list[Answers]] = {}
    for row, first, second, *right in zip(
        problems, before.completions, after.completions, before.correct, after.correct, strict=True
    ):
        one = Answers(row["prompt"], row["answer"], row.get("kind", "all"), first, second, *right)
        groups.setdefault((one.right_before, one.right_after), []).append(one)
    outcomes = (True, False), (True, True), (False, True), (False, False)
    return Comparison(*(groups.get(outcome, []) for outcome in outcomes))


def repair_set(
    flipped: Sequence[Any], ordinary: Sequence[Any], size: int, failing_share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """
    Draws the examples of a repair set without replacement: its share from the failing region, and the rest from
    ordinary data; where there is less of one, more of the other.

    Returns:
        `tuple[list, list]`: The two parts, of the same beginning for the same seed whatever the size.
    """
    rng = random.Random(seed)
    flipped, ordinary = (rng.sample(list(rows), len(rows)) for rows in (flipped, ordinary))
    rest = ordinary[: size - min(round(failing_share * size), len(flipped))]
    return flipped[: size - len(rest)], rest


def problem_rows(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Answers]) -> list[dict[str, list[int]]]:
    """Returns token ids and labels of problems with the first model's own solutions, on which alone the labels are."""
    texts, contexts = solutions(tokenizer, [{"prompt": one.prompt, "solution": one.before} for one in problems])
    rows = []
    for text, context in zip(texts, contexts, strict=True):
        before, own = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (context, text))
        rows.append({"input_ids": before + own, "labels": [-100] * len(before) + own})
    return rows


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int) -> list[dict[str, list[int]]]:
    """Returns token ids and labels of the whole windows of texts, which do not overlap and begin as the tokenizer
    begins a text.
    """
    rows, added = [], special_tokens(tokenizer)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += cut(added.around(ids), added.head, window)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def check_apart(learned: Iterable[str], held_out: Iterable[str], what: str) -> None:
    """Refuses texts to learn from that are among those held out.

    Raises:
        ValueError: Some are, with their number.
    """
    learned, held_out = ([" ".join(text.split()).casefold() for text in texts] for texts in (learned, held_out))
    known = set(held_out)
    if common := [text for text in learned if text in known]:
        raise ValueError(
            f"{len(common)} of the {len(learned)} {what} to learn from are in the evaluation set too, as "
            f"{common[0][:80]!r}: what would be measured is memory. Give others, or take these out."
        )


def prompts(problems: Iterable[Mapping[str, Any]]) -> list[str]:
    """The question of each problem."""
    return [row["prompt"][-1]["content"] for row in problems]


def lines(texts: Iterable[str]) -> list[str]:
    """The lines of texts that are long enough to be known again."""
    return [line for text in texts for line in text.splitlines() if len(re.sub(r"\W", "", line)) >= SHORTEST]


def digest(value: Any) -> str:
    """Returns the SHA-256 of something as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
