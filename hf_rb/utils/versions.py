"""The ranges of versions of the libraries whose private names we touch, and one sentence where one is outside.
Standard library only.
"""

import re
from importlib import metadata


__all__ = ["RANGES", "TESTED", "UnsupportedVersion", "check_versions", "release_of"]

TESTED = {"trl": "1.16", "transformers": "5.23 and 5.24", "peft": "0.21", "accelerate": "1.15"}

# As in pyproject.toml: from, and below.
RANGES = {"transformers": ("5.23", "6"), "trl": ("1.16", "2"), "peft": ("0.21", "1"), "accelerate": ("1.15", None)}

_supported = False


class UnsupportedVersion(ImportError):
    """Says that a library of `RANGES` is missing or outside its range."""


def check_versions() -> None:
    """Raises one sentence about all libraries of `RANGES` that are missing or outside their range; imports none of
    them.

    Raises:
        UnsupportedVersion: With the ranges, what is installed, and the command that mends it.
    """
    global _supported
    if _supported:
        return
    found, wanted = [], []
    for library, (floor, ceiling) in RANGES.items():
        required = f"{library}>={floor}" + (f",<{ceiling}" if ceiling else "")
        try:
            installed = metadata.version(library)
        except metadata.PackageNotFoundError:
            found.append(f"{required} (not installed)")
        else:
            release = release_of(installed)
            if release_of(floor) <= release and (ceiling is None or release < release_of(ceiling)):
                continue
            found.append(f"{required} (installed: {installed})")
        wanted.append(f"'{required}'")
    if found:
        raise UnsupportedVersion(f"hf_rb needs {' and '.join(found)}: run `pip install {' '.join(wanted)}`.")
    _supported = True


def release_of(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version."""
    # A development version counts as the release that it will be: what is built from source is let through.
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
