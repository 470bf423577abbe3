"""Settings and environment of the run, as its model card says, and those of the report. Always the last panel."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from hf_rb import __version__
from hf_rb.report.blocks import Block, Table, Text
from hf_rb.report.panels import each
from hf_rb.report.sources import Source


TITLE = "Environment"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    here = {"hf_rb": __version__} | {name: found for name in LIBRARIES if (found := _version(name))}
    where = (
        f"This report was made with Python {platform.python_version()} on {platform.system()} ({platform.machine()})"
    )
    carded = [source for source in sources if _section(source.card, "Versions")]
    return [
        *each(carded, _card, named),
        Text(f"{where} with {', '.join(f'{name} {number}' for name, number in here.items())}."),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _card(source: Source) -> list[Block]:
    versions = [
        line[2:].rpartition(" ")[::2] for line in _section(source.card, "Versions").splitlines() if line[:2] == "- "
    ]
    flags = re.findall(r"^\| `(.+?)` \| `(.*)` \|$", _section(source.card, "Hyper-parameters"), flags=re.MULTILINE)
    blocks: list[Block] = [Table(["made with", "version"], versions)] if versions else []
    return [*blocks, Table(["flag", "value"], flags, "What differs from the defaults.")] if flags else blocks


def _section(card: str, heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else ""
