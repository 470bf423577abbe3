"""Writes the schemas beside this file: `make schemas`."""

from pathlib import Path

from hf_rb.cli import schemas
from hf_rb.cli.schemas.build import build


for name in (*schemas.RECIPES, *schemas.QUANTIZATION, *schemas.PARTS):
    Path(__file__).with_name(f"{name}.json").write_text(build(name), encoding="utf-8")
