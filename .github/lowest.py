"""Prints constraints that pin every dependency with a floor to it: the newest patch of the lowest minor allowed."""

import re
import tomllib
from pathlib import Path


project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"]:
    if found := re.match(r"([\w-]+)>=([\d.]+)", requirement):
        print(f"{found[1]}=={found[2]}.*")
