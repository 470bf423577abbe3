"""Packages that only some features need, with the extra of hf_rb that installs each. Standard library only."""

from importlib import import_module
from typing import Any


__all__ = ["EXTRAS", "import_optional", "missing"]

# By the name a package is imported by: its name for pip, and the extra.
EXTRAS = {
    "bm25s": ("bm25s", "rl"),
    "lm_eval": ("lm-eval", "eval"),
    "math_verify": ("math-verify", "math"),
    "matplotlib": ("matplotlib", "report"),
    "triton": ("triton", "gpu"),
}


def import_optional(module: str, what: str) -> Any:
    """
    Imports a module of an optional package.

    Args:
        module (`str`):
            Name of the module, `"bm25s"` or `"lm_eval.tasks"`.
        what (`str`):
            Feature that needs it, as the subject of the error's sentence.

    Raises:
        ImportError: It is not installed, or lacks something itself; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise missing(module.partition(".")[0], what, error) from error


def missing(package: str, what: str, error: ImportError | None = None) -> ImportError:
    """Returns the error that names a feature, the package it needs and the extra that installs it."""
    name, extra = EXTRAS[package]
    lacks = getattr(error, "name", None) or package
    reason = "" if lacks.partition(".")[0] == package else f" ({error})"
    return ImportError(f"{what} needs {name}{reason}. Run `pip install 'hf_rb[{extra}]'`.")
