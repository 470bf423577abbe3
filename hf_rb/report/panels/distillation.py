"""Distillation: where student and teacher differ, token by token, and what the objective makes of it."""

from collections.abc import Sequence
from typing import Any

from hf_rb.methods import Metric
from hf_rb.methods.metrics import TOKEN_METRICS
from hf_rb.methods.registry import catalog
from hf_rb.report.blocks import Block, Table, number
from hf_rb.report.figures import curves, heat_map, histograms
from hf_rb.report.panels import each
from hf_rb.report.panels._tokens import calibration, has, logged, samples, snapshots, values, when
from hf_rb.report.sources import Source


TITLE = "Distillation: student and teacher, token by token"
PLACES = 20  # columns of the map by position
WORST = 12


def shows(source: Source) -> bool:
    names = ("forward_kl", *map(_prefix, _metrics()))
    return has(source, "forward_kl") or has(source, "loss") or bool(source.keys(*names))


def _metrics() -> list[Metric]:
    """Returns the metrics of objectives, and of what is mixed into one."""
    known = ((method.kind, metric) for method in catalog().values() for metric in method.metrics)
    return [metric for kind, metric in known if kind == "objective" or metric.stat]


def _logged() -> list[str]:
    """Returns the names of all metrics, and prefixes of those of a method."""
    return [*(metric.name for metric in TOKEN_METRICS), "kept_fraction", *dict.fromkeys(map(_prefix, _metrics()))]


def _prefix(metric: Metric) -> str:
    return metric.name.partition("/")[0] + "/"


def _meanings() -> dict[str, str]:
    """Returns what the value of a token means, by its name in the samples."""
    shown = [*(one for one in TOKEN_METRICS if one.name in ("forward_kl", "reverse_kl")), *_metrics()]
    return {"top10": "top-10 tokens in common"} | {metric.stat or metric.name: metric.meaning for metric in shown}


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, _build, named)


def _build(source: Source) -> list[Block]:
    blocks = logged(source, *_logged(), caption="Of all trained tokens since the log before.")
    found = [snapshot for snapshot in snapshots(source) if values(snapshot, "top10")]
    if not found:
        return blocks
    meanings = _meanings()
    names = [name for name in meanings if values(found[0], name)]
    rows = [[meanings[name], *(number(_mean(values(one, name)), 3) for one in found)] for name in names]
    blocks.append(Table(["mean over a few sequences", *map(when, found)], rows))
    shade_by = "reverse_kl" if "reverse_kl" in names else "forward_kl" if "forward_kl" in names else "loss"
    blocks += _by_position(found, shade_by)
    for metric in _metrics():
        name = metric.stat or metric.name
        if metric.range == "[0, 1]" and not {0.0, 1.0}.issuperset(values(found[0], name)):
            parts = {when(one): {"tokens": values(one, name)} for one in found}
            blocks.append(histograms(parts, f"{metric.meaning}, token by token.", metric.name, "tokens"))
    blocks += calibration(found)
    blocks.append(_worst(found[-1], shade_by))
    top = max(sorted(values(found[0], shade_by))[int(0.98 * (len(values(found[0], shade_by)) - 1))], 1e-6)
    shown = _meanings().get(shade_by, "loss")
    caption = (
        f"{shown} of every token, of the sequences with the largest. The darker, the larger, up to {top:.3g}; "
        "without colour: not trained on."
    )
    interest = lambda row: _mean([value for value in row[shade_by] if value is not None]) or 0.0  # noqa: E731
    return blocks + samples(found, shade_by, caption, interest, lambda kl: kl / top, hue=20)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _by_position(found: Sequence[dict[str, Any]], name: str) -> list[Block]:
    """The mean over sequences by where in its completion a token stands: late tokens are often others than early
    ones.
    """
    rows = []
    for snapshot in found:
        cells: list[list[float]] = [[] for _ in range(PLACES)]
        for row in snapshot["rows"]:
            numbers = [value for value in row[name] if value is not None]
            for place, value in enumerate(numbers):
                cells[PLACES * place // len(numbers)].append(value)
        rows.append([_mean(cell) for cell in cells])
    label = _meanings().get(name, "loss")
    caption = f"Mean {label} by place in the trained tokens, from their first to their last."
    x_label = "place in the trained tokens of a sequence, %"
    if len(rows) < 2:
        middles = [100 * (place + 0.5) / PLACES for place in range(PLACES)]
        return [curves({label: {when(found[0]): (middles, [cell or 0.0 for cell in rows[0]])}}, caption, x_label)]
    return [heat_map(rows, [when(one) for one in found], caption, x_label, span=(0, 100))]


def _worst(snapshot: dict[str, Any], name: str) -> Table:
    """The tokens at which the two differ most, with what stands before them."""
    found = []
    for row in snapshot["rows"]:
        for place, value in enumerate(row[name]):
            if value is not None:
                found.append(
                    (
                        value,
                        "".join(row["tokens"][max(place - 6, 0) : place]),
                        row["tokens"][place],
                        row["prob"][place],
                    )
                )
    found.sort(key=lambda one: -one[0])
    rows = [
        [f"{before!r} → {text!r}", number(value, 3), number(prob, 3)] for value, before, text, prob in found[:WORST]
    ]
    return Table(
        ["what stands before → label", _meanings().get(name, "loss"), "student's probability of it"],
        rows,
        f"Where they differ most, {when(snapshot)}.",
    )
