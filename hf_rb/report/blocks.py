"""Blocks that panels are made of. Each has one form in HTML and one in Markdown; `template.html.jinja` and `page.py`
know them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


__all__ = ["Block", "Figure", "Heading", "Table", "Text", "Tokens", "Word", "number"]


@dataclass(frozen=True)
class Heading:
    """A heading within a panel."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; its cells are text. The first `left` columns are set to the left, those after them, of numbers, to the
    right.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1


@dataclass(frozen=True)
class Figure:
    """
    A drawing, in HTML alone: whoever makes one gives its numbers in a table too where they are to be read in Markdown.

    Args:
        svg (`str`): The drawing.
        caption (`str`): What it shows, which is all that Markdown has.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Word:
    """
    A token of a sample.

    Args:
        text (`str`): The token.
        shade (`float`, *optional*): Strength of its colour, in [0, 1]; `None` where it is not trained on.
        dropped (`bool`, *optional*, defaults to `False`): Whether it is struck out.
        note (`str`, *optional*): What shows when the pointer rests on it.
    """

    text: str
    shade: float | None = None
    dropped: bool = False
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """
    Sequences of tokens, coloured in HTML; in Markdown nothing but those that are dropped stands out.

    Args:
        parts (`Mapping[str, Sequence[Sequence[Word]]]`): Sequences, by when they were recorded.
        caption (`str`): What the colours mean.
        marked (`str`, *optional*): What ⟦ ⟧ around dropped tokens mean, the caption in Markdown, which without it
            leaves the sequences out.
        hue (`int`, *optional*, defaults to `210`): Of the colour, in degrees.
    """

    parts: Mapping[str, Sequence[Sequence[Word]]]
    caption: str
    marked: str = ""
    hue: int = 210


Block = Heading | Text | Table | Figure | Tokens


def number(value: float | int | None, digits: int = 4) -> str:
    """Returns a number for a cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
