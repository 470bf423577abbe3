"""Tables for a terminal."""

from collections.abc import Sequence


__all__ = ["format_table"]


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
