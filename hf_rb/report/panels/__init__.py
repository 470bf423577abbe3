"""
The panels of a report, in the order of the page. A new method adds a module here and its name below.

A panel has

- `TITLE`: its heading;
- `shows(source) -> bool`: whether it has something to show of a [`~hf_rb.report.Source`]; reads what is there, draws
  nothing;
- `build(sources, named) -> list[Block]`: its blocks, of those sources that it shows, one or more; with `named`, which
  of them a block is of is said, since the page is about several.
"""

from collections.abc import Callable, Sequence

from hf_rb.report.blocks import Block, Heading
from hf_rb.report.sources import Source


__all__ = ["PANELS", "each"]

PANELS = ("curves", "profit", "distillation", "rl", "quantization", "moe", "recover", "evaluation")


def each(sources: Sequence[Source], build: Callable[[Source], list[Block]], named: bool) -> list[Block]:
    """Returns the blocks of every source, under its name where `named`."""
    return [block for source in sources for block in [*([Heading(source.name)] if named else []), *build(source)]]
