"""Progress of a merge, on disk: a line for every part of the work that is complete."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from hf_rb.weights.report import TensorReport


__all__ = ["Journal"]


class Journal:
    """Progress of the work: `done` files, and `tensors` of the next one; and what was measured."""

    def __init__(self, path: Path):
        self.path, self.done, self.tensors, self.rows = path, 0, 0, []
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole, newline, _ = text.rpartition("\n")  # behind the last newline lies what a kill has cut off
        for line in whole.splitlines():
            entry = json.loads(line)
            self.done, self.tensors = entry["done"], entry["tensors"]
            self.rows += [TensorReport(**row) for row in entry["rows"]]
        if path.is_file():
            os.truncate(path, len((whole + newline).encode()))

    def add(self, done: int, tensors: int, rows: list[TensorReport]) -> None:
        self.done, self.tensors = done, tensors
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"done": done, "tensors": tensors, "rows": [asdict(row) for row in rows]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
