"""Keys of each configuration, for `hf-rb check` and `--help`, without importing torch.

Our own keys are the JSON files beside this one, which `make schemas` writes. The keys of TRL and transformers are read
from their installed sources, so that they are those of the installed versions. An entry has `types`, `default`,
`choices`, `range` and `help`. A type is one of `null bool int float str dict any` or `list[...]` of one; a key whose
values are dataclasses has their `keys` too.
"""

import json
import shutil
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from hf_rb.cli.schemas.libraries import Missing, class_fields


__all__ = ["PARTS", "QUANTIZATION", "RECIPES", "listing", "load", "own_keys"]

# Verbs that run a recipe, with the source of its keys: a dataclass, or a function that makes a parser of dataclasses.
# Of two that know a recipe's keys equally well, the first wins.
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
# Dataclasses of which a key of a recipe holds fields.
PARTS = {"training": "hf_rb:GKDConfig"}


def load(name: str) -> dict[str, dict[str, Any]]:
    """
    Returns the entries of all keys of a recipe (`"sft"`), of a quantization config (`"ptqtp"`) or of a part
    (`"training"`). They are shared: nobody changes them.

    Raises:
        ValueError: The installed version of a library has no class that the configuration stands on.
    """
    entries: dict[str, dict[str, Any]] = {}
    for sources in _read(name)["libraries"]:
        entries |= _library_keys(sources)
    return entries | own_keys(name)


def own_keys(name: str) -> dict[str, dict[str, Any]]:
    """Returns the entries of the keys that no other library defines."""
    return _read(name)["keys"]


def listing(name: str) -> str:
    """Returns our own keys of a recipe, one a line with its help and its default, for `--help`."""
    own = own_keys(name)
    indent, width = max(map(len, own)) + 2, shutil.get_terminal_size().columns - 2
    lines = (f"{key:<{indent}}{_shown(entry)}" for key, entry in own.items())
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * indent) for line in lines)


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8"))


def _library_keys(sources: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the fields of the first of these classes that is installed."""
    for source in sources[:-1]:
        try:
            return class_fields(source)
        except Missing:
            continue
    return class_fields(sources[-1])


def _shown(entry: dict[str, Any]) -> str:
    help, default = entry["help"].partition(". ")[0].rstrip("."), "must be given"
    if "default" in entry:
        default = json.dumps(entry["default"])
    return f"{help}." if default in ("null", "{}", "[]") else f"{help} ({default})."
