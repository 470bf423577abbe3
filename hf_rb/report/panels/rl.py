"""Reinforcement learning: what the shapers did to the advantages, and which wrong answers many rollouts share."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hf_rb.report.blocks import Block, Table, Text, number
from hf_rb.report.figures import histograms, scatter
from hf_rb.report.panels import each
from hf_rb.report.panels._tokens import logged
from hf_rb.report.sources import Source


TITLE = "Rewards and shaped advantages"
CLASSES = 12
PROMPT = 90  # characters of a prompt in a table
NO_COMPLETIONS = (
    "This run has no table of completions. With `log_completions: true` in its recipe, the advantages before and "
    "after shaping and the largest classes of wrong answers stand here."
)


def shows(source: Source) -> bool:
    return bool(source.completions) or bool(source.keys("shaping/", "rewards/"))


def build(sources: Sequence[Source], named: bool) -> list[Block]:
    return each(sources, _build, named)


def _build(source: Source) -> list[Block]:
    blocks = logged(source, "rewards/", "shaping/", "completions/mean_length", caption="Rewards, shapers and lengths.")
    rows = source.completions
    if not rows:
        blocks.append(Text(NO_COMPLETIONS))
    shaped = [row for row in rows if _is_number(row.get("shaped_advantage")) and _is_number(row.get("advantage"))]
    if shaped:
        blocks += _advantages(shaped)
    if any(row.get("error_class") is not None for row in rows):
        blocks += _error_classes(rows)
    return blocks


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _advantages(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    parts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        # EDAS's column: the class of a wrong answer.
        name = "all" if "error_class" not in row else "others" if row["error_class"] is None else "wrong answers"
        parts[name].append(row)
    columns = {
        name: ([r["advantage"] for r in part], [r["shaped_advantage"] for r in part]) for name, part in parts.items()
    }
    changed = sum(abs(row["advantage"] - row["shaped_advantage"]) > 1e-6 for row in rows)
    table = []
    for name, (before, after) in columns.items():
        cells = [
            sum(before) / len(before),
            sum(after) / len(after),
            max(abs(a - b) for a, b in zip(before, after, strict=True)),
        ]
        table.append([name, number(len(before)), *(f"{cell:.4f}" for cell in cells)])
    headers = ["rollouts", "number", "mean before", "mean after shaping", "largest change"]
    both = {
        "before shaping": {n: x for n, (x, _) in columns.items()},
        "after shaping": {n: y for n, (_, y) in columns.items()},
    }
    return [
        Table(headers, table, f"Advantages of {len(rows):,} rollouts; shaping changed {changed / len(rows):.1%}."),
        scatter(columns, "Each point a rollout; on the line nothing changed.", "advantage", "shaped advantage"),
        histograms(both, "The same, counted.", "advantage", "rollouts"),
    ]


def _error_classes(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Wrong answers of one prompt at one step, the largest classes first: what EDAS lowers most."""
    groups: dict[tuple[Any, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row.get("step"), str(row.get("prompt"))].append(row)
    classes, sizes = [], Counter()
    for (step, _), group in groups.items():
        for name, count in Counter(row["error_class"] for row in group if row.get("error_class") is not None).items():
            sizes[count] += count
            members = [row for row in group if row["error_class"] == name and _is_number(row.get("shaped_advantage"))]
            change = sum(row["shaped_advantage"] - row["advantage"] for row in members) / max(len(members), 1)
            classes.append(
                (count, [_shown(group[0]["prompt"]), name, f"{count} of {len(group)}", number(step), f"{change:+.4f}"])
            )
    classes.sort(key=lambda one: -one[0])
    wrong = sum(sizes.values())
    spread = [[number(size), number(count), f"{count / wrong:.1%}"] for size, count in sorted(sizes.items())]
    headers = ["prompt", "wrong answer", "rollouts", "step", "mean change by shaping"]
    return [
        Table(headers, [row for _, row in classes[:CLASSES]], "The largest classes of errors."),
        Table(
            ["rollouts with the same wrong answer", "wrong rollouts", "share"], spread, f"{wrong:,} wrong rollouts."
        ),
    ]


def _shown(prompt: str | list[Mapping[str, Any]]) -> str:
    """A prompt for a table; of a conversation its last message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text if len(text) <= PROMPT else text[:PROMPT] + "…"
