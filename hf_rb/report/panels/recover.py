"""Recovery after quantization: full precision, quantized and recovered, as `hf-rb recover` has measured them."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, Text, number
from hf_rb.report.panels import each
from hf_rb.report.sources import Source


TITLE = "Quantized and recovered"
KEYS = ("rows", "failures", "problems")
COLUMNS = ("bytes", "exact_match", "regained", "perplexity", "tokens_per_second")


def shows(source: Source) -> bool:
    return bool(source.find(*KEYS))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, lambda source: [block for report in source.find(*KEYS) for block in _table(report)], named)


def _table(report: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            row["model"],
            row.get("objective") or "–",
            number(row.get("examples")),
            *(number(row.get(key)) for key in COLUMNS),
        ]
        for row in report["rows"]
    ]
    kinds = report["failures"].get("quantized", {}).get("flipped_by_kind", {})
    broken = [[kind, number(count)] for kind, count in kinds.items()]
    headers = ["model", "trained with", "examples", "bytes", "exact match", "regained", "perplexity", "tokens/s"]
    caption = f"{report['problems']:,} held-out problems" + (f" of {report['task']}." if report.get("task") else ".")
    sentence = (report.get("quality") or {}).get("sentence")
    texts = [Text(said) for said in [sentence, *report.get("notes", [])] if said]
    blocks: list[Block] = [Table(headers, rows, caption, left=2), *texts]
    return [*blocks, Table(["problems of the pool that broke", "number"], broken)] if broken else blocks
