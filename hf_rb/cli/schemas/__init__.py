"""What each configuration accepts, as JSON: written by `make schemas`, read by `hf-rb check` without importing torch.

`load` returns `{"versions": {library: minor}, "keys": {key: {"types", "default", "choices", "range", "help"}}}`. A type is
one of `null bool int float str dict any` or `list[...]` of one; a key whose values are dataclasses has their `keys` too.
"""

import json
from pathlib import Path
from typing import Any


__all__ = ["QUANTIZATION", "RECIPES", "load"]

# What a recipe may be for: the verb that runs it. Where two know a recipe's keys equally well, the first wins.
RECIPES = ("sft",)
# `quant_method` to the public name of its config.
QUANTIZATION = {"ptqtp": "PTQTPConfig"}


def load(name: str) -> dict[str, Any]:
    """Returns the schema of a recipe (`"sft"`) or of a quantization config (`"ptqtp"`)."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))
