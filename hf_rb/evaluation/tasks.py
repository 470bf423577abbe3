"""Problems with checkable answers: the embedded ones, and files in the format of GSM8K."""

import json
import re
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hf_rb import tiny
from hf_rb.rl.answers import gold_answer, same_answer


__all__ = ["is_correct", "load_task", "rendered", "solutions"]


def load_task(name: str, limit: int | None = None, split: str = "test") -> list[dict[str, Any]]:
    """Loads problems, held-out ones by default.

    Args:
        name (`str`):
            `"tiny:math"`, or the path of a JSON-lines file with a `question` and an `answer` that ends in
            `#### <answer>`, as GSM8K has them.
        limit (`int`, *optional*):
            Takes the first so many.
        split (`str`, *optional*, defaults to `"test"`):
            `"test"` or `"train"` of an embedded task; a file is taken as it is.

    Returns:
        `list[dict]`: Rows with `prompt` (a conversation of one user message), `solution` (text), `answer` and `kind`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not a task of ours, not JSON, a column is missing, or there is nothing in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no problem: write 1 or more.")
    rows = _embedded(name, limit, split) if name.startswith("tiny:") else _file(Path(name), limit)
    if not rows:
        raise ValueError(f"{name} holds no problems.")
    return rows


def _embedded(name: str, limit: int | None, split: str) -> list[dict[str, Any]]:
    dataset: Any = tiny.load_dataset(name.removeprefix("tiny:"), config="prompt_completion", split=split, size=limit)
    return [
        {
            "prompt": row["prompt"],
            "solution": row["completion"][0]["content"],
            "answer": row["answer"],
            "kind": row["kind"],
        }
        for row in dataset
    ]


def _file(path: Path, limit: int | None) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no task file {path}: write tiny:math or the path of a JSON-lines file.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}): write one object a line.") from error
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}, line {number} has {found or 'no columns'}: expected the columns question and answer."
            )
        answer = tiny.extract_answer(str(row["answer"]))
        if answer is None:
            raise ValueError(f"{path}, line {number}: the answer does not end in `#### <answer>`.")
        prompt = [{"role": "user", "content": row["question"]}]
        rows.append({"prompt": prompt, "solution": row["answer"], "answer": answer, "kind": path.stem})
        if len(rows) == limit:
            break
    return rows


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    """Returns a conversation as the chat template writes it."""
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))


def solutions(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Renders worked solutions as assistant turns.

    Returns:
        `tuple[list[str], list[str]]`: The solutions, and in front of each the prompt up to where the assistant begins:
        `texts` and `contexts` of [`perplexity`].

    Raises:
        ValueError: The chat template does not begin a conversation as it begins its prompt.
    """
    texts, contexts = [], []
    for row in rows:
        context = rendered(tokenizer, row["prompt"], add_generation_prompt=True)
        turn = [{"role": "assistant", "content": row["solution"]}]
        whole = rendered(tokenizer, row["prompt"] + turn)
        if not whole.startswith(context):
            raise ValueError(
                "The chat template writes a prompt in another way when an answer follows, so prompt and solution "
                "cannot be told apart. Give the tokenizer a template that keeps prefixes."
            )
        texts.append(whole.removeprefix(context))
        contexts.append(context)
    return texts, contexts


def is_correct(text: str, answer: str | float | None, lenient: bool = False) -> bool:
    """Says whether what follows the last `####` of `text` is `answer`, as [`~hf_rb.rl.answers.same_answer`] compares
    them.

    Args:
        text (`str`):
            Completion of a model.
        answer (`str` or number):
            Reference answer, or a text that ends in `#### <answer>`. With `None` nothing is correct.
        lenient (`bool`, *optional*, defaults to `False`):
            Takes the last number of a text without `####` as its answer.
    """
    found = tiny.extract_answer(text)
    if found is None and lenient:
        found = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) or [None])[-1]
    gold = gold_answer(answer)
    return same_answer(found, gold and (tiny.extract_answer(gold) or gold))
