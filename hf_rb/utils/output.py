"""Output of the verbs: tables for a terminal, and JSON for a program."""

import json
import math
from collections.abc import Sequence
from typing import Any


__all__ = ["finite", "format_table", "json_text"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first to the left, the others to the right.

    Args:
        header (`Sequence[str]`):
            Column names.
        rows (`Sequence[Sequence[str]]`):
            One sequence of cells a row.

    Returns:
        `str`: Lines joined by newlines, with a rule under the header.
    """
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def json_text(value: Any) -> str:
    """Returns indented JSON that every reader takes: [`finite`] first."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """Returns a value of lists and dictionaries with `None` for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
