"""What each configuration accepts, as JSON: written by `make schemas`, read by `hf-rb check` without importing torch.

`load` returns `{"versions": {library: minor}, "keys": {key: {"types", "default", "choices", "range", "help", "own"}}}`. A type is
one of `null bool int float str dict any` or `list[...]` of one; a key whose values are dataclasses has their `keys` too; `own` are
those that no other library defines.
"""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any


__all__ = ["PARTS", "QUANTIZATION", "RECIPES", "listing", "load"]

# What a recipe may be for, the verb that runs it, and where its keys come from: a dataclass, or a function that makes a
# parser of dataclasses. Where two know a recipe's keys equally well, the first wins.
RECIPES = {
    "sft": "hf_rb.scripts.sft:make_parser",
    "gkd": "hf_rb.scripts.gkd:make_parser",
    "distillation": "hf_rb.scripts.distillation:make_parser",
    "grpo": "hf_rb.scripts.grpo:make_parser",
    "quantize": "hf_rb.cli.quantize:QuantizeArguments",
    "upcycle": "hf_rb.cli.upcycle:UpcycleArguments",
    "recover": "hf_rb.recover.config:RecoverConfig",
}
# The quantization configs by their `quant_method`.
QUANTIZATION = {
    "d2quant": "hf_rb:D2QuantConfig",
    "ptqtp": "hf_rb:PTQTPConfig",
}
# What a key of a recipe holds the fields of.
PARTS = {"training": "hf_rb:GKDConfig"}


def load(name: str) -> dict[str, Any]:
    """Returns the schema of a recipe (`"sft"`), of a quantization config (`"ptqtp"`) or of a part (`"training"`)."""
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def listing(name: str) -> str:
    """Returns our own keys of a recipe, one a line with its help and its default, for `--help`."""
    own = {key: entry for key, entry in load(name)["keys"].items() if entry.get("own")}
    indent, width = max(map(len, own)) + 2, shutil.get_terminal_size().columns - 2
    lines = (f"{key:<{indent}}{_shown(entry)}" for key, entry in own.items())
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * indent) for line in lines)


def _shown(entry: dict[str, Any]) -> str:
    help, default = entry["help"].partition(". ")[0].rstrip("."), "must be given"
    if "default" in entry:
        default = json.dumps(entry["default"])
    return f"{help}." if default in ("null", "{}", "[]") else f"{help} ({default})."
