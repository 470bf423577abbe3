"""Measurements of `hf-rb eval` in a model card: the Hub's `model-index` in its head, and a table in its text."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_rb.hub.card import ModelCardData, Result, render_results
from hf_rb.hub.pages import existing_card, model_card


__all__ = ["add_results", "add_section", "card_with_results", "read_results"]

HEADING = "## Measured with `hf-rb eval`"


def read_results(path: str | Path, models: Sequence[str | Path] = ()) -> list[Result]:
    """Reads the results in a file of `hf-rb eval --out`.

    Args:
        path (`str` or `Path`):
            The file.
        models (`Sequence[str | Path]`, *optional*, defaults to `()`):
            Folders or Hub ids, by the last part of which the measured model must be called; by default, it is not
            asked.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, one of another model, one of a sweep, or nothing but the size was measured.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: `hf-rb eval MODEL --out {path}` writes it.")
    names = {field.name for field in fields(Result)}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        entries: list[dict[str, Any]] = [] if "sweep" in document else document["results"]
        # `null` stands for what is infinite or no number, such as the perplexity of a broken model.
        entries = [{**entry, "value": math.nan if entry["value"] is None else entry["value"]} for entry in entries]
        results = [Result(**{key: value for key, value in entry.items() if key in names}) for entry in entries]
        if not all(isinstance(result.value, (int, float)) for result in results):
            raise TypeError("a value is no number")
        measured = str(document["model"]) if models else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold what `hf-rb eval --out` writes: {error!r}.") from error
    if "sweep" in document:
        raise ValueError(
            f"{path} is a sweep of several models: measure one of its folders, which have cards of their own."
        )
    if not results:
        raise ValueError(f"{path}: only the size was measured. Add --task, --perplexity or --harness to `hf-rb eval`.")
    called = {Path(model).resolve().name for model in models}
    if models and Path(measured).resolve().name not in called:
        raise ValueError(
            f"{path} measures {measured}, not {models[0]}. If they are the same, write the latter as `model` in "
            f"{path}."
        )
    return results


def add_results(readme: str | Path, results: Sequence[Result]) -> Path:
    """Writes results into a model card, in place of what this function wrote there before; makes the card where there
    is none.

    Args:
        readme (`str` or `Path`):
            Path of `README.md`.
        results (`Sequence[Result]`):
            Results. One of the card with the same metric and data gets the new value in the metadata.

    Returns:
        `Path`: The card.
    """
    Path(readme).write_text(card_with_results(readme, results), encoding="utf-8")
    return Path(readme)


def card_with_results(readme: str | Path, results: Sequence[Result]) -> str:
    """Returns what [`add_results`] writes."""
    readme = Path(readme)
    text = existing_card(readme.parent) or model_card(readme.resolve().parent)
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    old = {(one.dataset_name, one.metric_name): one for one in data.eval_results or ()}
    new = ModelCardData(readme.resolve().parent.name, results=results).metadata().eval_results or ()
    data.eval_results = list((old | {(one.dataset_name, one.metric_name): one for one in new}).values()) or None
    data.model_name = data.model_name or readme.resolve().parent.name  # the Hub's model-index needs one

    text = with_section(card.text, HEADING, render_results(results))
    return f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n"


def add_section(readme: str | Path, heading: str, markdown: str) -> None:
    """Writes a section into a model card, in place of the one with the same heading."""
    text = with_section(Path(readme).read_text(encoding="utf-8"), f"## {heading}", markdown)
    Path(readme).write_text(text, encoding="utf-8")


def with_section(card: str, heading: str, markdown: str) -> str:
    """Returns the card with a section before what it says of hyper-parameters and versions."""
    body = re.sub(rf"\n*{re.escape(heading)}\n.*?(?=\n## |\Z)", "\n", card, flags=re.DOTALL)
    head, found, tail = body.partition("\n## Hyper-parameters\n")
    if not found:
        head, found, tail = body.partition("\n## Versions\n")
    return f"{head.rstrip()}\n\n{heading}\n\n{markdown}\n{found}{tail}"
