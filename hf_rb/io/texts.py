"""Texts that a user names, for calibration and for perplexity."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


__all__ = ["check_columns", "column_problem", "read_texts"]


def column_problem(data: str) -> str | None:
    """
    Returns what is wrong with the columns of a JSON-lines file, by its first row alone and without importing anything.

    Args:
        data (`str`):
            As in [`read_texts`]. Of anything but a JSON-lines file nothing is said.
    """
    if not data.endswith((".jsonl", ".json")) or not os.path.isfile(data):
        return None
    with open(data, encoding="utf-8") as lines:
        try:
            row = json.loads(next((line for line in lines if line.strip()), "null"))
        except ValueError:  # not one row a line: `read_texts` tells
            return None
    return _without_text(data, row) if isinstance(row, dict) else None


def check_columns(data: str, columns: Iterable[str] | None = None) -> None:
    """
    Refuses texts without the column `text`.

    Args:
        data (`str`):
            As in [`read_texts`].
        columns (`Iterable[str]`, *optional*):
            Its columns. Defaults to those of the first row of a JSON-lines file.

    Raises:
        ValueError: No column `text`.
    """
    if problem := column_problem(data) if columns is None else _without_text(data, columns):
        raise ValueError(problem)


def _without_text(data: str, columns: Iterable[str]) -> str | None:
    if "text" in columns:
        return None
    return f"{data} has the columns {', '.join(columns)}; one called `text` is needed: rename the one to read."


def read_texts(data: str, split: str) -> list[str]:
    """
    Reads texts.

    Args:
        data (`str`):
            A text file, a JSON-lines file with the column `text`, or a dataset of the Hub as `NAME` or `NAME:CONFIG`
            with that column.
        split (`str`):
            Split of a dataset of the Hub.

    Returns:
        `list[str]`: One text of a text file, else one a row.

    Raises:
        FileNotFoundError: There is no such file, and no such dataset that can be loaded.
        ValueError: No column `text`, something else in it, no JSON lines, or no text at all.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in (".jsonl", ".json"):
        texts = [path.read_text(encoding="utf-8")]
    else:
        if path.is_file():
            rows = _json_rows(path)
        elif path.suffix in (".txt", ".jsonl", ".json"):
            raise FileNotFoundError(f"There is no file {data}.")
        else:
            rows = _hub_rows(data, split)
        check_columns(data, rows.column_names)
        texts = list(rows["text"])
        if others := [(row, text) for row, text in enumerate(texts) if not isinstance(text, str)]:
            raise ValueError(f"The column `text` of {data} has {others[0][1]!r} in row {others[0][0]}; expected text.")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{data} holds no text.")
    return texts


def _hub_rows(data: str, split: str):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, config = data.partition(":")
    try:
        return load_dataset(name, config or None, split=split)
    except (OSError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise FileNotFoundError(
            f"{data} is no file here, and loading it as a dataset of the Hub failed ({reason}). Write the path of a "
            "text file or of a JSON-lines file with the column `text`, or a dataset by its full name, such as "
            "`Salesforce/wikitext:wikitext-2-raw-v1`."
        ) from error


def _json_rows(path: Path):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset("json", data_files=str(path), split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{path} holds no JSON lines: {error.__cause__}") from error
    except (StopIteration, ValueError) as error:  # of an empty file, of one with empty lines
        raise ValueError(f"{path} holds no text.") from error
