"""What can be known of a recipe's data without loading it: rows and columns of embedded datasets and of local text files."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_rb import tiny


__all__ = ["column_rules", "rows"]

# Files are counted line by line up to so many bytes, and by the length of their first lines beyond.
COUNTED_BYTES = 32 << 20
EMBEDDED = {
    "messages": {"messages"},
    "prompt_completion": {"prompt", "completion"},
    "prompt_only": {"prompt"},
    "rubric": {"prompt", "rubric"},
    "tools": {"prompt", "messages", "tools"},
}


def rows(args: Any) -> int | None:
    """Returns the number of training rows, or `None` where the data is not here."""
    if _is_embedded(args):
        return 389 if args.dataset_config == "tools" else tiny.SIZES.get(args.dataset_train_split)
    files = _files(args)
    if not files or any(file.suffix not in (".jsonl", ".json", ".txt", ".csv") for file in files):
        return None
    return sum(_count_lines(file) - (file.suffix == ".csv") for file in files)


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
            yield f"{found} {verb.upper()} needs `messages`, `prompt` with `completion`, or `{args.dataset_text_field}`."
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
    """The data files of a mixture if all of them are local and named one by one; the columns are as they are in the files."""
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
