"""Measurements: those of `hf-rb eval --out`, and those of the trainer at the end of a run."""

from collections.abc import Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, number
from hf_rb.report.figures import curves
from hf_rb.report.panels import each
from hf_rb.report.sources import Source


TITLE = "Evaluations"
KEYS = ("results", "size")


def shows(source: Source) -> bool:
    return bool(source.find(*KEYS) or source.find("sweep") or source.documents.get("eval_results.json"))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, _build, named)


def _build(source: Source) -> list[Block]:
    blocks: list[Block] = []
    for document in source.find(*KEYS):
        rows = [[result["metric"], result["dataset"], number(result["value"])] for result in document["results"]]
        size = document["size"]
        rows += [["bytes of the weight files", "", number(size["file_bytes"])]]
        if speed := document.get("speed"):
            rows.append(
                [f"decoding, batch {speed['batch_size']}, tokens/s", "", number(speed["tokens_per_second"], 3)]
            )
        blocks.append(Table(["measure", "data", "value"], rows, f"hf-rb eval {document.get('model', '')}", left=2))
        blocks += _wrong(document)
    for document in source.find("sweep"):
        blocks += _sweep(document["sweep"])
    if document := source.documents.get("eval_results.json"):
        rows = [[key, number(value)] for key, value in document.items() if isinstance(value, (int, float))]
        blocks.append(Table(["last evaluation of the run", "value"], rows))
    return blocks


def _wrong(document: dict) -> list[Block]:
    match = document.get("exact_match") or {}
    by_kind = match.get("by_kind") or {}
    if len(by_kind) < 2:
        return []
    return [Table(["kind of problem", "exact match"], [[kind, f"{share:.1%}"] for kind, share in by_kind.items()])]


def _sweep(sweep: list[dict]) -> list[Block]:
    def value(one: dict, part: str, name: str) -> Any:
        return (one.get(part) or {}).get(name)

    measures = {"exact match": ("exact_match", "accuracy"), "perplexity": ("perplexity", "perplexity")}
    measures = {title: key for title, key in measures.items() if any(value(one, *key) is not None for one in sweep)}
    rows = [[f"{one['lambda']:g}", *(number(value(one, *key)) for key in measures.values())] for one in sweep]
    # An infinite perplexity is `null` in the document.
    points = {title: [one for one in sweep if value(one, *key) is not None] for title, key in measures.items()}
    drawn = {
        title: {title: ([one["lambda"] for one in points[title]], [value(one, *key) for one in points[title]])}
        for title, key in measures.items()
    }
    figures = [curves(drawn, "Over lambda.", "lambda")] if drawn else []
    return [*figures, Table(["lambda", *measures], rows)]
