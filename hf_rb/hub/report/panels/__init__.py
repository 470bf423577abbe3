"""
The panels of a report, in the order of the page. A new method adds a module here and its name below.

A panel has

- `TITLE`: its heading;
- `shows(source) -> bool`: whether it has something to show of a [`~hf_rb.hub.report.Source`]; reads what is there, draws nothing;
- `build(sources) -> list[Block]`: its blocks, of those sources that it shows, one or more.
"""

from collections.abc import Callable, Sequence

from hf_rb.hub.report.blocks import Block, Heading
from hf_rb.hub.report.sources import Source


__all__ = ["PANELS", "each"]

PANELS = ("curves", "profit", "distillation", "rl", "quantization", "moe", "recover", "evaluation")


def each(sources: Sequence[Source], build: Callable[[Source], list[Block]]) -> list[Block]:
    """Returns the blocks of every source, under its name where there are several."""
    headings = [[Heading(source.name)] if len(sources) > 1 else [] for source in sources]
    return [block for heading, source in zip(headings, sources, strict=True) for block in [*heading, *build(source)]]
