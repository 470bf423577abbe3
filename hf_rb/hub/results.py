"""Measurements of `hf-rb eval` in a model card: the Hub's `model-index` in its head, and a table in its text."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCard

from hf_rb.hub.card import ModelCardData, Result, render_card, render_results


__all__ = ["add_results", "read_results"]

HEADING = "## Measured with `hf-rb eval`"


def read_results(path: str | Path) -> list[Result]:
    """Reads the results in a file of `hf-rb eval --out`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: `hf-rb eval MODEL --out {path}` writes it.")
    names = {field.name for field in fields(Result)}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        results = [Result(**{key: value for key, value in entry.items() if key in names}) for entry in entries]
        if not all(isinstance(result.value, (int, float)) for result in results):
            raise TypeError("a value is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold what `hf-rb eval --out` writes: {error!r}.") from error
    return results


def add_results(readme: str | Path, results: Sequence[Result]) -> Path:
    """Writes results into a model card, in place of what this function wrote there before; makes the card where there is none.

    Args:
        readme (`str` or `Path`):
            Path of `README.md`.
        results (`Sequence[Result]`):
            Results. One of the card with the same metric and data gets the new value in the metadata.

    Returns:
        `Path`: The card.
    """
    readme = Path(readme)
    text = (
        readme.read_text(encoding="utf-8")
        if readme.is_file()
        else render_card(ModelCardData(readme.resolve().parent.name))
    )
    card = ModelCard(text, ignore_metadata_errors=True)
    old = {(one.dataset_name, one.metric_name): one for one in card.data.eval_results or ()}
    new = ModelCardData(readme.resolve().parent.name, results=results).metadata().eval_results or ()
    card.data.eval_results = list((old | {(one.dataset_name, one.metric_name): one for one in new}).values()) or None
    card.data.model_name = card.data.model_name or readme.resolve().parent.name  # the Hub's model-index needs one

    body = re.sub(rf"\n*{re.escape(HEADING)}\n.*?(?=\n## |\Z)", "\n", card.text, flags=re.DOTALL)
    section = f"\n{HEADING}\n\n{render_results(results)}\n"
    head, found, tail = body.partition("\n## Hyper-parameters\n")
    if not found:
        head, found, tail = body.partition("\n## Versions\n")
    card.text = f"{head.rstrip()}\n{section}{found}{tail}"
    readme.write_text(f"---\n{card.data.to_yaml()}\n---\n{card.text.rstrip()}\n", encoding="utf-8")
    return readme
