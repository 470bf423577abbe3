"""Findings of `hf-rb doctor`: passed, failed or skipped, in words without paths of this machine."""

import contextlib
import io
import logging
import os
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


__all__ = ["Finding", "Skipped", "expect", "finding_of", "public"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        group (`str`): `"versions"`, `"names"`, `"imports"`, `"registration"`, `"quantization"`, `"adapters"`,
            `"training"` or `"behaviour"`.
        name (`str`): Subject of the check.
        state (`str`): `"passed"`, `"failed"` or `"skipped"`.
        detail (`str`): Reason of a failure or a skip, or a figure.
        seconds (`float`): Wall time.
    """

    group: str
    name: str
    state: str
    detail: str
    seconds: float


class Skipped(Exception):
    """Says why a check does not apply to what is installed."""


def expect(condition: Any, sentence: str) -> None:
    """Raises a `RuntimeError` with the sentence where the condition does not hold."""
    if not condition:
        raise RuntimeError(sentence)


def finding_of(group: str, name: str, check: Callable[[], str | None]) -> Finding:
    """Runs a check, which may return a detail, and turns anything that it raises into a finding."""
    start = time.perf_counter()
    try:
        with _quiet():
            state, detail = "passed", check() or ""
    except Skipped as reason:
        state, detail = "skipped", str(reason)
    except Exception as error:  # a library of another version may raise anything
        state, detail = "failed", _short(f"{type(error).__name__}: {error}")
    return Finding(group, name, state, public(detail), round(time.perf_counter() - start, 3))


def _short(text: str, limit: int = 4) -> str:
    lines = text.splitlines()
    return "\n".join(lines[:limit]) + (f"\n… and {len(lines) - limit} more lines" if len(lines) > limit else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the output and the warnings of trainers and libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
    finally:
        logging.disable(before)


def public(text: str) -> str:
    """Returns a text with placeholders for folders of this machine and user, fit for a bug report."""
    package = Path(__file__).parents[3]
    folders = {
        **{sysconfig.get_path(name): "<site-packages>" for name in ("platlib", "purelib")},
        **{path: "<path>" for path in sys.path if len(Path(path).parts) > 2},
        str(package): "<hf_rb>",
        tempfile.gettempdir(): "<temporary>",
        sys.prefix: "<prefix>",
        sys.base_prefix: "<python>",
        os.getcwd(): "<here>",
        os.path.expanduser("~"): "<home>",
    }
    for folder in sorted((one for one in folders if len(one) > 1), key=len, reverse=True):
        text = text.replace(folder, folders[folder])
    return text
