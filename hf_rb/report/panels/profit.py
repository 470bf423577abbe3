"""ProFit: which labels have left the loss, and whether the probabilities that decide it mean what they say."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, number
from hf_rb.report.figures import histograms
from hf_rb.report.panels import each
from hf_rb.report.panels._tokens import calibration, has, logged, samples, snapshots, values, when
from hf_rb.report.sources import Source


TITLE = "ProFit: what was masked"


def shows(source: Source) -> bool:
    return has(source, "kept") or bool(source.keys("profit/"))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, _build, named)


def _build(source: Source) -> list[Block]:
    blocks = logged(source, "profit/", caption="Of all labels since the log before.")
    found = [snapshot for snapshot in snapshots(source) if values(snapshot, "kept")]
    if not found:
        return blocks
    blocks.append(_masked(found))
    blocks.append(
        histograms(
            {when(one): {"kept": _probs(one, True), "dropped": _probs(one, False)} for one in found},
            "Probability of the labels of a few sequences of the training data, counted on a logarithmic scale.",
            "probability of the label",
            "labels",
            bins=[i / 25 for i in range(26)],
            log=True,
        )
    )
    blocks += calibration(found)
    blocks.append(_most_dropped(found[-1]))
    most = "The sequences with most dropped labels."
    caption = f"{most} Struck out: left the loss. The darker, the less probable; without colour: not trained on."
    interest = lambda row: sum(passes is False for passes in row["kept"])  # noqa: E731
    dropped = lambda row, place: not row["kept"][place]  # noqa: E731
    marked = f"{most} What stands in ⟦ ⟧ left the loss."
    return blocks + samples(found, "prob", caption, interest, lambda p: 1 - p, dropped, marked)


def _probs(snapshot: dict[str, Any], kept: bool) -> list[float]:
    pairs = zip(values(snapshot, "prob"), values(snapshot, "kept"), strict=True)
    return [prob for prob, passes in pairs if passes == kept]


def _masked(found: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for snapshot in found:
        kept, dropped = _probs(snapshot, True), _probs(snapshot, False)
        thirds = [f"{share:.1%}" for share in _dropped_by_third(snapshot)]
        means = [number(sum(part) / len(part), 3) if part else "–" for part in (kept, dropped)]
        rows.append(
            [
                when(snapshot),
                number(len(kept) + len(dropped)),
                f"{len(dropped) / (len(kept) + len(dropped)):.1%}",
                *means,
                *thirds,
            ]
        )
    headers = [
        "a few sequences",
        "labels",
        "dropped",
        "mean p kept",
        "mean p dropped",
        "first third",
        "second",
        "last",
    ]
    return Table(
        headers, rows, "Labels that left the loss, and the share dropped in each third of a sequence's labels."
    )


def _dropped_by_third(snapshot: dict[str, Any]) -> list[float]:
    counts, dropped = [0, 0, 0], [0, 0, 0]
    for row in snapshot["rows"]:
        kept = [value for value in row["kept"] if value is not None]
        for place, passes in enumerate(kept):
            third = 3 * place // len(kept)
            counts[third] += 1
            dropped[third] += not passes
    return [part / max(count, 1) for part, count in zip(dropped, counts, strict=True)]


def _most_dropped(snapshot: dict[str, Any]) -> Table:
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for row in snapshot["rows"]:
        for text, passes in zip(row["tokens"], row["kept"], strict=True):
            if passes is not None:
                total[text] += 1
                counts[text] += not passes
    rows = [
        [repr(text), number(count), number(total[text]), f"{count / total[text]:.0%}"]
        for text, count in counts.most_common(12)
        if count
    ]
    return Table(["token", "dropped", "seen", "share"], rows, f"Tokens dropped most often, {when(snapshot)}.")
