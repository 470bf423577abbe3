"""Parts that the panels of tokens share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, Tokens, Word, number
from hf_rb.report.figures import curves
from hf_rb.report.sources import Source


SAMPLES = 3  # sequences that are shown


def snapshots(source: Source) -> list[dict[str, Any]]:
    return source.tokens.get("snapshots", [])


def has(source: Source, name: str) -> bool:
    return any(name in row for snapshot in snapshots(source) for row in snapshot["rows"])


def values(snapshot: Mapping[str, Any], name: str) -> list[Any]:
    """Returns a number of every token that is trained on."""
    return [value for row in snapshot["rows"] for value in row.get(name, ()) if value is not None]


def when(snapshot: Mapping[str, Any]) -> str:
    return f"at step {snapshot['step']}" if snapshot["step"] else "before training"


def logged(source: Source, *prefixes: str, caption: str) -> list[Block]:
    """Draws what a method has logged, and says how it began and ended."""
    keys = [key for key in source.keys(*prefixes) if source.series(key)[0]]
    if not keys:
        return []
    rows = [[key, number(y[0]), number(y[-1])] for key in keys for _, y in [source.series(key)]]
    drawn = {key: {source.name: source.series(key)} for key in keys if len(set(source.series(key)[1])) > 1}
    return [*([curves(drawn, caption)] if drawn else []), Table(["number", "first", "last"], rows)]


def samples(
    found: Sequence[Mapping[str, Any]],
    name: str,
    caption: str,
    interest: Callable[[Mapping[str, Any]], float],
    shade: Callable[[float], float],
    dropped: Callable[[Mapping[str, Any], int], bool] = lambda row, place: False,
    marked: str = "",
    hue: int = 210,
) -> list[Block]:
    """
    Shows sequences of every snapshot, each token coloured by a number of it: those that are of most interest in the
    last one.

    Args:
        found: Snapshots.
        name: The number.
        caption: What the colours mean.
        interest: Of a row, how much it is worth seeing; at 0 not at all.
        shade: From the number to the strength of the colour, in [0, 1].
        dropped: Whether the token at a place of a row is struck out.
        marked, hue: As of [`Tokens`].
    """
    rows = found[-1]["rows"]
    ranked = sorted(range(len(rows)), key=lambda index: -interest(rows[index]))
    chosen = sorted(index for index in ranked[:SAMPLES] if interest(rows[index]))
    parts = {
        when(snapshot): [
            [_word(row, place, name, shade, dropped) for place in range(len(row["tokens"]))]
            for row in (snapshot["rows"][index] for index in chosen if index < len(snapshot["rows"]))
        ]
        for snapshot in found
    }
    return [Tokens(parts, caption, marked, hue)] if chosen else []


def _word(row: Mapping[str, Any], place: int, name: str, shade: Callable, dropped: Callable) -> Word:
    text, value = row["tokens"][place], row[name][place]
    if value is None:
        return Word(text)
    note = ", ".join(f"{key} {number(row[key][place], 3)}" for key in row if key != "tokens")
    return Word(text, min(max(shade(value), 0.0), 1.0), dropped(row, place), note)


def calibration(found: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Draws how often the most probable token is the label, where the model gives it a probability."""
    lines, rows = {}, []
    for snapshot in found:
        pairs = list(zip(values(snapshot, "top_prob"), values(snapshot, "correct"), strict=True))
        tenths: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
        for pair in pairs:
            tenths[min(int(10 * pair[0]), 9)].append(pair)
        points = [
            (sum(p for p, _ in tenth) / len(tenth), sum(right for _, right in tenth) / len(tenth))
            for tenth in tenths
            if tenth
        ]
        lines[when(snapshot)] = ([x for x, _ in points], [y for _, y in points])
        certain, right = sum(p for p, _ in pairs) / len(pairs), sum(right for _, right in pairs) / len(pairs)
        gap = sum(abs(sum(p - right for p, right in tenth)) for tenth in tenths) / len(pairs)
        rows.append([when(snapshot), number(len(pairs)), f"{certain:.3f}", f"{right:.3f}", f"{gap:.3f}"])
    lines["as certain as right"] = ([0.0, 1.0], [0.0, 1.0])
    caption = (
        "Calibration: of the tokens whose most probable continuation has about this probability, how many are "
        "continued so."
    )
    return [
        curves({"calibration": lines}, caption, "probability of the most probable token"),
        Table(["calibration", "tokens", "mean certainty", "right", "mean gap (ECE)"], rows),
    ]
