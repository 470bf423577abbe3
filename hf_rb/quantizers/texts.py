"""Texts that a user names, for calibration and for perplexity."""

from pathlib import Path


__all__ = ["read_texts"]


def read_texts(data: str, split: str) -> list[str]:
    """
    Reads texts.

    Args:
        data (`str`):
            A text file, a JSON-lines file with the column `text`, or a dataset of the Hub as `NAME` or `NAME:CONFIG` with
            that column.
        split (`str`):
            Split of a dataset of the Hub.

    Returns:
        `list[str]`: One text of a text file, else one a row.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No column `text`, something else in it, no JSON lines, or no text at all.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in (".jsonl", ".json"):
        texts = [path.read_text(encoding="utf-8")]
    else:
        from datasets import load_dataset

        if path.is_file():
            rows = _json_rows(path)
        elif path.suffix in (".txt", ".jsonl", ".json"):
            raise FileNotFoundError(f"There is no file {data}.")
        else:
            name, _, config = data.partition(":")
            rows = load_dataset(name, config or None, split=split)
        if "text" not in rows.column_names:
            raise ValueError(f"{data} has the columns {', '.join(rows.column_names)}; one called `text` is needed.")
        texts = list(rows["text"])
        if others := [(row, text) for row, text in enumerate(texts) if not isinstance(text, str)]:
            raise ValueError(f"The column `text` of {data} has {others[0][1]!r} in row {others[0][0]}; expected text.")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{data} holds no text.")
    return texts


def _json_rows(path: Path):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset("json", data_files=str(path), split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{path} holds no JSON lines: {error.__cause__}") from error
    except (StopIteration, ValueError) as error:  # of an empty file, of one with empty lines
        raise ValueError(f"{path} holds no text.") from error
