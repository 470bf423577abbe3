"""Keys of each configuration, for `hf-rb check` and `--help`, without importing torch.

The keys are read from the sources of the config classes, ours and those of the installed TRL and transformers. An
entry has `types`, `default`, `choices`, `range` and `help`. A type is one of `null bool int float str dict any` or
`list[...]` of one; a key whose values are dataclasses has their `keys` too; a key of ours has `own`.
"""

import json
import shutil
import textwrap
from functools import cache
from typing import Any

from hf_rb.cli.schemas.libraries import class_fields
from hf_rb.methods.registry import methods


__all__ = ["PARTS", "RECIPES", "listing", "load", "own_keys", "quantization"]

_TRL = ("trl:ModelConfig", "trl:DatasetMixtureConfig")
# Verbs that run a recipe, with the dataclasses of its keys. Of two that know a recipe's keys equally well, the first
# wins.
RECIPES = {
    "sft": ("hf_rb.scripts.sft:SFTScriptArguments", "hf_rb:SFTConfig", *_TRL),
    "gkd": ("hf_rb.scripts._common:ScriptArguments", "hf_rb:GKDConfig", *_TRL),
    "distillation": ("hf_rb.scripts._common:ScriptArguments", "hf_rb:DistillationConfig", *_TRL),
    "grpo": ("hf_rb.scripts.grpo:GRPOScriptArguments", "hf_rb:GRPOConfig", *_TRL),
    "quantize": ("hf_rb.cli.quantize:QuantizeArguments",),
    "upcycle": ("hf_rb.cli.upcycle:UpcycleArguments",),
    "recover": ("hf_rb.recover.config:RecoverConfig",),
}
# Dataclasses of which a key of a recipe holds fields.
PARTS = {"training": ("hf_rb:GKDConfig",)}


def quantization() -> list[str]:
    """Returns the values that `quant_method` may have."""
    return [*methods("quantizer")]


@cache
def load(name: str) -> dict[str, dict[str, Any]]:
    """
    Returns the entries of all keys of a recipe (`"sft"`), of a quantization config (`"ptqtp"`) or of a part
    (`"training"`). They are shared: nobody changes them.

    Raises:
        ValueError: The installed version of a library has no class that the configuration stands on.
    """
    sources = (RECIPES | PARTS).get(name) or (methods("quantizer")[name].method.config,)
    return {key: entry for source in sources for key, entry in class_fields(source).items()}


def own_keys(name: str) -> dict[str, dict[str, Any]]:
    """Returns the entries of the keys that no other library defines."""
    return {key: entry for key, entry in load(name).items() if entry.get("own")}


def listing(name: str) -> str:
    """Returns our own keys of a recipe, one a line with its help and its default, for `--help`."""
    own = own_keys(name)
    indent, width = max(map(len, own)) + 2, shutil.get_terminal_size().columns - 2
    lines = (f"{key:<{indent}}{_shown(entry)}" for key, entry in own.items())
    return "\n".join(textwrap.fill(line, width, subsequent_indent=" " * indent) for line in lines)


def _shown(entry: dict[str, Any]) -> str:
    help, default = entry["help"].partition(". ")[0].rstrip("."), "must be given"
    if "default" in entry:
        default = json.dumps(entry["default"])
    return f"{help}." if default in ("null", "{}", "[]") else f"{help} ({default})."
