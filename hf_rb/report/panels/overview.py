"""Overview of the sources, with the ends of their runs, in one table. Always the first panel."""

import re
from collections.abc import Iterator, Sequence

from hf_rb.hub.card import MADE
from hf_rb.methods.registry import catalog
from hf_rb.report.blocks import Block, Table, number
from hf_rb.report.panels import evaluation, moe, quantization, recover
from hf_rb.report.sources import Source


TITLE = "Overview"
# Of a run's log; the mean over the run where it was too short to log a loss.
LOGGED = ("loss", "eval_loss", "reward", "mean_token_accuracy", "eval_mean_token_accuracy")
# A reference in the sentence of a model card.
REFERENCE = re.compile(r"\[(.+?)\]\(.+?\)|`(.+?)`")


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    rows = [
        [source.name, _made(source, "model"), _made(source, "data"), _method(source), "; ".join(_numbers(source))]
        for source in sources
    ]
    headers = ["run", "model", "data", "method", "final numbers"]
    return [Table(headers, [[cell or "–" for cell in row] for row in rows], left=len(headers))]


def _made(source: Source, part: str) -> str:
    """What the model was made from or with, as its card says; else the model or the data that was measured."""
    if found := MADE.search(source.card):
        return REFERENCE.sub(r"\1\2", found[part] or "")
    keys = {"model": ("model",), "data": ("data", "task", "eval_data")}[part]
    found = [document[key] for document in source.documents.values() for key in keys if document.get(key)]
    return ", ".join(dict.fromkeys(map(str, found)))


def _method(source: Source) -> str:
    if named := re.findall(r"^- \*\*(.+?)\*\* \(\[paper\]", source.card, flags=re.MULTILINE):
        return ", ".join(named)
    if trainer := re.search(r"\(`hf_rb\.(\w+)Trainer`\)", source.card):
        return trainer[1]
    known = catalog()
    keys = source.tokens.get("methods", []) + [report["method"] for report in source.find(*quantization.KEYS)]
    return ", ".join(known[key].name if key in known else key for key in keys)


def _numbers(source: Source) -> Iterator[str]:
    last = {key: y[-1] for key in (*LOGGED, "train_loss") for _, y in [source.series(key)] if y}
    if "loss" in last:
        last.pop("train_loss", None)
    yield from (f"{key} {number(value)}" for key, value in last.items())
    for report in source.find(*quantization.KEYS):
        yield f"{number(report['bits_per_weight'], 3)} bits a weight"
        if report.get("perplexity_after"):
            yield f"perplexity {number(report['perplexity_after'])}"
    for report in source.find(*moe.KEYS):
        yield f"MaxVio at most {number(max(layer['max_vio'] for layer in report['layers']), 3)}"
    for report in source.find(*recover.KEYS):
        yield from (f"{row['model']}: exact match {number(row['exact_match'])}" for row in report["rows"])
    for document in source.find(*evaluation.KEYS):
        yield from (f"{result['metric']} {number(result['value'])}" for result in document["results"])
