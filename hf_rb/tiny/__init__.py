"""The embedded default: a tiny model family, a task with checkable answers and a fact base. Nothing is downloaded.

Recipes write `tiny:teacher`, `tiny:student`, `tiny:moe` where a model name goes and `tiny:math` where a dataset name
goes. `python -m hf_rb.tiny.build` makes all of it again from a seed.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hf_rb.tiny.problems import extract_answer


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "ASSETS",
    "CONFIGS",
    "MODELS",
    "SIZES",
    "extract_answer",
    "load_dataset",
    "path",
    "resolve",
    "tool_schemas",
]

ASSETS = Path(__file__).parent / "assets"
MODELS = ("teacher", "student", "moe")
CONFIGS = ("messages", "prompt_completion", "prompt_only", "rubric", "tools")
SIZES = {"train": 10_000, "test": 500}


def path(name: str) -> Path:
    """Returns the folder of a member of the family: `"teacher"`, `"student"` or `"moe"`.

    Raises:
        ValueError: There is no such member.
    """
    if name not in MODELS:
        raise ValueError(
            f"'tiny:{name}' does not exist: write one of {', '.join(f'tiny:{model}' for model in MODELS)}"
        )
    return ASSETS / name


def resolve(name: str) -> str:
    """Turns `"tiny:student"` into the folder it stands for; any other name or path comes back unchanged."""
    prefix, colon, member = name.partition(":")
    return str(path(member)) if colon and prefix == "tiny" else name


@cache
def _search_schema() -> str:
    import json

    from transformers.utils import get_json_schema

    from hf_rb.tiny.facts import search

    return json.dumps(get_json_schema(search))


def tool_schemas() -> list[dict]:
    """Returns the JSON schema of the fact base's `search` tool, as a chat template takes it."""
    import json

    return [json.loads(_search_schema())]


def load_dataset(
    name: str = "math", config: str = "messages", split: str = "train", size: int | None = None, seed: int = 0
) -> "Dataset":
    """Makes one of the embedded datasets.

    Args:
        name (`str`, *optional*, defaults to `"math"`):
            Only `"math"` exists.
        config (`str`, *optional*, defaults to `"messages"`):
            `"messages"` and `"prompt_completion"` hold word problems with solutions, `"prompt_only"` without,
            `"rubric"` without and with a `rubric` for a judge of steps; `"tools"` holds two-hop questions over the
            fact base with tool-call transcripts in `messages` and the tool's schema in `tools`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`; no operands (no question, for `"tools"`) occur in both.
        size (`int`, *optional*):
            Number of rows: 10,000 for train and 500 for test when not given; for `"tools"` all there are (389 and 91).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the problem generator.

    Returns:
        `datasets.Dataset`: With the columns of the format, `answer` (`str`) and `kind` (`str`).

    Raises:
        ValueError: Unknown name, config or split.
    """
    from datasets import Dataset

    if name != "math":
        raise ValueError(f"'tiny:{name}' is not a dataset: write tiny:math")
    if config not in CONFIGS:
        raise ValueError(f"dataset_config={config!r} does not exist for tiny:math: write one of {', '.join(CONFIGS)}")
    if config == "tools":
        return Dataset.from_list(_tool_rows(split)[:size])
    from hf_rb.tiny.problems import generate

    rows = []
    for problem in generate(split, size or SIZES.get(split), seed):
        prompt = [{"role": "user", "content": problem.question}]
        completion = [{"role": "assistant", "content": problem.solution}]
        columns = {
            "messages": {"messages": prompt + completion},
            "prompt_completion": {"prompt": prompt, "completion": completion},
            "prompt_only": {"prompt": prompt},
            "rubric": {"prompt": prompt, "rubric": problem.rubric},
        }[config]
        rows.append({**columns, "answer": problem.answer, "kind": problem.kind})
    return Dataset.from_list(rows)


def _tool_rows(split: str) -> list[dict]:
    from hf_rb.tiny.facts import generate_transcripts

    return [
        {
            "prompt": messages[:1],
            "messages": messages,
            "tools": tool_schemas(),
            "answer": question.answer,
            "kind": f"{question.hops[0].relation}-{question.hops[1].relation}",
        }
        for question, messages in generate_transcripts(split)
    ]
