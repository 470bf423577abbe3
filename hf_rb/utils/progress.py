"""Progress of long work: a bar on a terminal, and in a log file a line every half minute."""

import sys
from typing import Any

import tqdm as standard


__all__ = ["SECONDS", "tqdm"]

SECONDS = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f}%), {elapsed} so far, about {remaining} to go{postfix}"


class tqdm(standard.tqdm):
    """`tqdm.tqdm` that writes whole lines, and few of them, where its `disable=None` writes nothing."""

    def __init__(self, *args: Any, disable: bool | None = None, **options: Any):
        self._lines = disable is None and not sys.stderr.isatty()
        if self._lines:
            disable = False
            options |= {"mininterval": SECONDS, "maxinterval": 2 * SECONDS, "delay": SECONDS}
            options |= {"leave": False, "bar_format": LINE}
        super().__init__(*args, disable=disable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if not self._lines:
            return super().display(msg, pos)
        if msg is None:  # an empty message is what wipes out a bar
            self.fp.write(f"{self}\n")
