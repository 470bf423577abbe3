"""A search tool over a set of passages, as a TRL tool environment: BM25 by `bm25s`, ids of what was found kept for the
scorer.

```python
trainer = GRPOTrainer(..., environment_factory=search_environment("passages.jsonl", top_k=3))
```

TRL makes one environment for each rollout of a batch and shows the model its public methods; they share one index.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_rb.utils.optional import import_optional


__all__ = ["FactSearch", "Index", "Passage", "PassageSearch", "read_passages", "search_environment"]

FACTS = "tiny:facts"

_INSTRUCTION = "Search as often as you need, for one fact at a time. Then answer in as few words as possible, {}."
_FORMS = {
    "hashes": "on a line that begins with ####",
    "boxed": r"in \boxed{}",
    "tag": "between <answer> and </answer>",
}


@dataclass(frozen=True)
class Passage:
    """
    One document.

    Attributes:
        id (`str`): Unique in its corpus; what says that two rollouts found the same document.
        text (`str`): What the model reads, on one line.
        keywords (`str`, *optional*, defaults to `""`): Words that find the document too and are not shown.
    """

    id: str
    text: str
    keywords: str = ""


class Index:
    """
    Passages that can be searched.

    Args:
        passages (`list[Passage]`):
            At least one.
        top_k (`int`, *optional*, defaults to `3`):
            How many a search returns at most; those that share no word with the query are left out.

    Raises:
        ImportError: `bm25s` is not installed.
        ValueError: No passage, or `top_k` below 1.
    """

    def __init__(self, passages: list[Passage], top_k: int = 3):
        bm25s = import_optional("bm25s", "A search environment")
        if not passages or top_k < 1:
            raise ValueError(f"A search needs passages and top_k of at least 1, not {len(passages)} and {top_k}.")
        self.passages, self.top_k = passages, min(top_k, len(passages))
        self._tokenize = partial(bm25s.tokenize, stopwords="en", show_progress=False)
        self._bm25 = bm25s.BM25()
        texts = [f"{passage.keywords} {passage.text}" for passage in passages]
        self._bm25.index(self._tokenize(texts), show_progress=False)

    def search(self, query: str) -> list[Passage]:
        """Returns the best matches, best first; none for a query without a word that occurs."""
        tokens = self._tokenize([query], return_ids=False)
        if not tokens[0]:
            return []
        found, scores = self._bm25.retrieve(tokens, k=self.top_k, show_progress=False)
        return [self.passages[row] for row, score in zip(found[0], scores[0], strict=True) if score > 0]


class PassageSearch:
    """
    The environment of one rollout. Its public methods but `reset` are the model's tools.

    Args:
        index ([`Index`]):
            What is searched.
        answer_extractor (`str`, *optional*, defaults to `"hashes"`):
            The form of answer to ask for where a row has a question and no prompt: a key of
            `hf_rb.rewards.EXTRACTORS`.

    Attributes:
        retrieved (`dict[str, list[str]]`): By the text of a tool message, the ids of the passages in it.
    """

    def __init__(self, index: Index, answer_extractor: str = "hashes"):
        self._index, self._instruction = index, _INSTRUCTION.format(_FORMS[answer_extractor])
        self.retrieved: dict[str, list[str]] = {}

    def reset(self, prompt: Any = None, question: str | None = None, **row: Any) -> str | None:
        """Forgets the last rollout. Asks the row's `question` if it has no `prompt`."""
        self.retrieved = {}
        return f"{question}\n{self._instruction}" if prompt is None and question is not None else None

    def search(self, query: str) -> str:
        """
        Search an encyclopedia.

        Args:
            query: What to look for.

        Returns:
            The passages that match best, one a line.
        """
        return self._search(query)

    def _search(self, query: str) -> str:
        passages = self._index.search(query)
        text = "\n".join(passage.text for passage in passages) or "Nothing found."
        self.retrieved[text] = [passage.id for passage in passages]
        return text


class FactSearch(PassageSearch):
    """The search tool that the tiny family learnt to call: its description is what it was trained on."""

    def search(self, query: str) -> str:
        """
        Search the fact base.

        Args:
            query: What to look for.

        Returns:
            The two best matching facts, one a line.
        """
        return self._search(query)


def read_passages(path: str | Path) -> list[Passage]:
    """
    Reads a corpus.

    Args:
        path (`str` or `Path`):
            A JSONL file with `text` in every line and, optionally, `id` and `title`.

    Raises:
        ValueError: A line is not such an object, or an id occurs twice. The message names the line.
    """
    passages, ids = [], set()
    # Not `splitlines`: inside a passage there may be characters that Unicode counts as line ends.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            title, text = row.get("title") or "", row["text"]
            identifier = str(row.get("id", number))
            shown = " ".join(text.split())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: write one JSON object a line, with "text" and, if you have them, "id" and '
                '"title".'
            ) from error
        if identifier in ids:
            raise ValueError(f"{path}, line {number}: the id {identifier!r} occurs twice.")
        ids.add(identifier)
        passages.append(Passage(identifier, f"{title}: {shown}" if title else shown))
    return passages


def search_environment(
    corpus: str = FACTS, top_k: int | None = None, answer_extractor: str = "hashes"
) -> Callable[[], PassageSearch]:
    """
    Returns what TRL's `environment_factory` takes.

    Args:
        corpus (`str`, *optional*, defaults to `"tiny:facts"`):
            The fact base of the tiny family, or a JSONL file as [`read_passages`] reads it.
        top_k (`int`, *optional*):
            Passages a search returns at most. Defaults to 2 for the fact base, to 3 for a file.
        answer_extractor (`str`, *optional*, defaults to `"hashes"`):
            As in [`PassageSearch`].
    """
    if corpus == FACTS:
        from hf_rb.tiny.facts import fact_base

        passages = [Passage(fact.text, fact.text, fact.relation) for fact in fact_base()]
        return partial(FactSearch, Index(passages, 2 if top_k is None else top_k), answer_extractor)
    return partial(PassageSearch, Index(read_passages(corpus), 3 if top_k is None else top_k), answer_extractor)
