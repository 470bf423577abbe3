"""Facts about a recipe's data without loading it: rows and columns of embedded datasets and of local text files."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_rb import tiny
from hf_rb.io.texts import column_problem
from hf_rb.utils.fields import value_problem


__all__ = ["BUILDERS", "column_rules", "dataset_rules", "file_problem", "rows", "text_problem"]

# Files are counted line by line up to so many bytes, and by the length of their first lines beyond.
COUNTED_BYTES = 32 << 20
EMBEDDED = {
    "messages": {"messages"},
    "prompt_completion": {"prompt", "completion"},
    "prompt_only": {"prompt"},
    "rubric": {"prompt", "rubric"},
    "tools": {"prompt", "messages", "tools"},
}
# Endings of data files, with the builder of `datasets` that reads them.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def rows(args: Any) -> int | None:
    """Returns the number of training rows, or `None` where the data is not here."""
    if _is_embedded(args):
        return 389 if args.dataset_config == "tools" else tiny.SIZES.get(args.dataset_train_split)
    files = _files(args)
    if not files or any(file.suffix not in (".jsonl", ".json", ".txt", ".csv") for file in files):
        return None
    return sum(_count_lines(file) - (file.suffix == ".csv") for file in files)


def dataset_rules(args: Any) -> Iterator[str]:
    """Yields what is wrong with the names of embedded data, and with the splits of a mixture."""
    if args.datasets:
        if args.eval_strategy != "no" and args.test_split_size is None:
            yield (
                f"`eval_strategy: {args.eval_strategy}` needs a test split, and `datasets` has none by itself. Write "
                "`test_split_size: 0.1`, or `eval_strategy: 'no'`."
            )
    elif _is_embedded(args):
        choices = {"dataset_name": ["tiny:math"], "dataset_config": tiny.CONFIGS, "dataset_train_split": [*tiny.SIZES]}
        if args.eval_strategy != "no":
            choices["dataset_test_split"] = [*tiny.SIZES]
        yield from filter(None, (value_problem(key, getattr(args, key), choices=choices[key]) for key in choices))


def file_problem(name: str) -> str | None:
    """Returns what is wrong with a data file as `dataset_name`, or `None` for other names."""
    if Path(name).suffix not in BUILDERS:
        return None
    if not Path(name).is_file():
        return f"`dataset_name` names {name!r}, which does not exist."
    return (
        f"`dataset_name: {name}` is a file. Write `datasets: [{{path: {BUILDERS[Path(name).suffix]}, data_files: "
        f"{name}}}]`."
    )


def text_problem(key: str, name: str) -> str | None:
    """Returns what is wrong with a text, which is a file, an embedded dataset or one of the Hub: its name, or no
    column `text`.
    """
    if name.startswith("tiny:"):
        return value_problem(key, name, choices=["tiny:math"])
    path = Path(name)
    if not path.exists():
        is_file = path.suffix in (".txt", ".jsonl", ".json") or name.startswith(("/", "./", "../"))
        return f"`{key}` names {name!r}, which does not exist." if is_file else None
    problem = column_problem(name)
    return problem and f"`{key}`: {problem}"


def column_rules(args: Any, verb: str) -> Iterator[str]:
    """Yields which columns a verb misses in the data, where they are known."""
    columns = _columns(args)
    if columns is None:
        return
    found = f"The dataset has the columns {', '.join(sorted(columns))}."
    needed: list[str] = []
    if verb in ("sft", "gkd"):
        enough = [{"messages"}, {"conversations"}, {"input_ids"}, {"prompt", "completion"}, {args.dataset_text_field}]
        alone = verb == "gkd" and args.lmbda == 1 and "prompt" in columns
        if not alone and not any(one <= columns for one in enough):
            yield (
                f"{found} {verb.upper()} needs `messages`, `prompt` with `completion`, or `{args.dataset_text_field}`."
            )
    elif not (getattr(args, "environment", None) and "question" in columns):
        needed.append("prompt")
    if verb == "distillation" and args.gopd_teacher_column:
        needed.append(args.gopd_teacher_column)
    if verb == "grpo" and "srar" in args.advantage_shapers:
        needed.append("rubric")
    for name in needed:
        if name not in columns:
            yield f"{found} This recipe needs `{name}`."


def _is_embedded(args: Any) -> bool:
    return not args.datasets and (args.dataset_name or "").startswith("tiny:")


def _columns(args: Any) -> set[str] | None:
    if _is_embedded(args):
        config = args.dataset_config or "messages"
        return EMBEDDED[config] | {"answer", "kind"} if config in EMBEDDED else None
    files = _files(args)
    if not files or not all(file.suffix in (".jsonl", ".csv") for file in files):
        return None
    found = [_first_row(file) for file in files]
    return set.intersection(*found) if all(found) else None


def _first_row(file: Path) -> set[str]:
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        if file.suffix == ".csv":
            return set(next(csv.reader(stream), ()))
        try:
            row = json.loads(stream.readline(1 << 24))
        except ValueError:
            return set()
    return set(row) if isinstance(row, dict) else set()


def _files(args: Any) -> list[Path]:
    """The data files of a mixture if all of them are local and named one by one; the columns are as they are in the
    files.
    """
    files = []
    for entry in args.datasets or []:
        named = entry["data_files"] if isinstance(entry["data_files"], list) else [entry["data_files"]]
        if entry.get("columns") or not all(isinstance(name, str) for name in named):
            return []
        files += [Path(entry["data_dir"] or "", name) for name in named]
    return files if all(file.is_file() for file in files) else []


def _count_lines(file: Path) -> int:
    with file.open("rb") as stream:
        head = stream.read(COUNTED_BYTES)
    lines = head.count(b"\n") + (not head.endswith(b"\n"))
    return lines if len(head) < COUNTED_BYTES else round(lines * file.stat().st_size / len(head))
