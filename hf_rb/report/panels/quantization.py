"""Quantization: what the files weigh, what was lost, and in which layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, Text, number
from hf_rb.report.figures import bars
from hf_rb.report.panels import each
from hf_rb.report.sources import Source


TITLE = "Quantization: size, quality and error by layer"
KEYS = ("method", "layers", "bits_per_weight")
DRAWN = 160  # layers of a drawing


def shows(source: Source) -> bool:
    return bool(source.find(*KEYS))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    reports = [(source.name, report) for source in sources for report in source.find(*KEYS)]
    return [
        *_sizes(reports),
        *each(sources, lambda source: [b for report in source.find(*KEYS) for b in _layers(report)], named),
    ]


def _sizes(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Block]:
    rows = []
    for name, report in reports:
        before, after = report.get("perplexity_before"), report.get("perplexity_after")
        error = _mean(report["layers"], "relative_error")
        rows += [
            [
                f"{name} ({report['method']})",
                number(report["file_bytes"]),
                number(report["bits_per_weight"], 3),
                number(error),
                number(after),
            ],
            [
                "  rounded to 4 bits",
                number(report["baseline_file_bytes"]),
                "–",
                number(_mean(report["layers"], "baseline_error")),
                number(report.get("perplexity_rounded")),
            ],
            ["  before", number(report["source_bytes"]), "–", "0", number(before)],
        ]
    headers = ["model", "bytes of the files", "true bits a weight", "relative error", "perplexity"]
    data = {report["eval_data"] for _, report in reports if report.get("eval_data")}
    caption = "Whole files: embeddings, scales and headers included." + (
        f" Perplexity on {', '.join(sorted(data))}." if data else ""
    )
    said = [(name, (report.get("quality") or {}).get("sentence"), report.get("verdict")) for name, report in reports]
    verdicts = [Text(f"{name}: {sentence}") for name, *sentences in said for sentence in sentences if sentence]
    return [Table(headers, rows, caption), *verdicts]


def _layers(report: Mapping[str, Any]) -> list[Block]:
    layers = report["layers"]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    rows = [
        [
            kind,
            number(len(part)),
            number(sum(layer["weights"] for layer in part)),
            number(_mean(part, "relative_error")),
            number(_mean(part, "baseline_error")),
        ]
        for kind, part in kinds.items()
    ]
    worst = sorted(layers, key=lambda layer: -layer["relative_error"])[:DRAWN]
    drawn = [layer for layer in layers if layer in worst] if len(layers) > DRAWN else layers
    series = {
        "error": [layer["relative_error"] for layer in drawn],
        "rounded to 4 bits": [layer.get("baseline_error") for layer in drawn],
    }
    caption = "Relative error of every quantized layer" + (
        f"; the {DRAWN} largest of {len(layers)}." if len(layers) > DRAWN else "."
    )
    blocks: list[Block] = [
        Table(["layers", "number", "weights", "relative error", "rounded to 4 bits"], rows),
        bars([layer["name"].removeprefix("model.layers.") for layer in drawn], series, caption, "relative error"),
    ]
    if report.get("blocks"):
        cells = [
            [b["name"], number(b["hidden_error"]), number(b.get("shift_before")), number(b.get("shift_after"))]
            for b in report["blocks"]
        ]
        blocks.append(Table(["decoder layer", "error of its output", "input of the MLP lost", "corrected"], cells))
    if report.get("allocation"):
        cells = [
            [a["name"], number(a["numerical"]), number(a["structural"]), number(a["score"]), number(a["given"])]
            for a in report["allocation"]
        ]
        blocks.append(Table(["decoder layer (NSDS)", "numerical", "structural", "sensitivity", "given"], cells))
    return blocks


def _mean(layers: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The root of the mean square over weights, as `hf-rb quantize` gives it."""
    if any(layer.get(name) is None for layer in layers) or not layers:
        return None
    weights = sum(layer["weights"] for layer in layers)
    return (sum(layer["weights"] * layer[name] ** 2 for layer in layers) / weights) ** 0.5
