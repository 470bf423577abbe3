"""Drawings as SVG text, by matplotlib, which is imported where the first one is made."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from hf_rb.report.blocks import Figure


__all__ = ["bars", "curves", "heat_map", "histograms", "scatter"]

COLUMNS, WIDTH, HEIGHT = 3, 3.5, 2.1  # drawings in a row, and inches of one
COLORS = ["#1f6feb", "#d1570c", "#2a8a4a", "#8250df", "#b5303c", "#5b6673"]
Series = tuple[Sequence[float], Sequence[float]]


def curves(groups: Mapping[str, Mapping[str, Series]], caption: str, x_label: str = "step") -> Figure:
    """Draws small multiples: of each title, lines by name over a common x."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas(len(groups))
    # A run has one colour in all of them.
    colors = dict(zip(dict.fromkeys(name for lines in groups.values() for name in lines), cycle(COLORS), strict=False))
    for axis, (title, lines) in zip(axes, groups.items(), strict=True):
        for name, (x, y) in lines.items():
            marker = "o" if len(x) < 3 else None
            label = f" {name}" if name.startswith("_") else name  # which matplotlib would leave out of the legend
            axis.plot(x, y, color=colors[name], label=label, linewidth=1.4, marker=marker, markersize=3)
        if all(isinstance(place, int) for x, _ in lines.values() for place in x):
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axis.set_xlabel(x_label, fontsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    return _finish(figure, caption)


def histograms(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    caption: str,
    x_label: str,
    y_label: str,
    bins: Any = 30,
    log: bool = False,
) -> Figure:
    """Draws of each title histograms by name, one over the other, with a logarithmic count (the y axis) on request."""
    figure, axes = _canvas(len(groups))
    for axis, (title, parts) in zip(axes, groups.items(), strict=True):
        axis.hist(
            list(parts.values()), bins=bins, label=list(parts), color=COLORS[: len(parts)], stacked=True, log=log
        )
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axis.set_xlabel(x_label, fontsize=8)
        axis.set_ylabel(y_label, fontsize=8)
        if len(parts) > 1:
            axis.legend(fontsize=7, frameon=False)
    return _finish(figure, caption)


def scatter(points: Mapping[str, Series], caption: str, x_label: str, y_label: str) -> Figure:
    """Draws points by name, with the line on which y is x."""
    figure, (axis,) = _canvas(1, width=1.3 * WIDTH, height=1.3 * HEIGHT)
    for color, (name, (x, y)) in zip(COLORS, points.items(), strict=False):
        axis.scatter(x, y, s=10, alpha=0.5, color=color, label=name, linewidths=0)
    low, high = (pick((*axis.get_xlim(), *axis.get_ylim())) for pick in (min, max))
    axis.plot([low, high], [low, high], color="#999", linewidth=0.8, linestyle="--")
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    if len(points) > 1:
        axis.legend(fontsize=7, frameon=False)
    return _finish(figure, caption)


def bars(names: Sequence[str], series: Mapping[str, Sequence[float | None]], caption: str, y_label: str) -> Figure:
    """Draws groups of bars, one for each name."""
    figure, (axis,) = _canvas(1, width=max(1.3 * WIDTH, 0.16 * len(names) * len(series)), height=1.6 * HEIGHT)
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(names))]
        heights = [float("nan") if value is None else value for value in values]
        axis.bar(places, heights, width, color=COLORS[index % len(COLORS)], label=name)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_ylabel(y_label, fontsize=8)
    if len(series) > 1:
        axis.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series))
    return _finish(figure, caption)


def heat_map(
    rows: Sequence[Sequence[float | None]],
    names: Sequence[str],
    caption: str,
    x_label: str,
    center: float | None = None,
    span: tuple[float, float] | None = None,
) -> Figure:
    """Draws a matrix, its rows by name from the top; a value at `center` is white. Columns are numbered from 0, or
    divide `span`.
    """
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    values = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
    figure, (axis,) = _canvas(1, width=COLUMNS * WIDTH, height=0.9 + 0.28 * len(names))
    norm = None
    if center is not None:
        norm = TwoSlopeNorm(center, min(np.nanmin(values), center - 1e-9), max(np.nanmax(values), center + 1e-9))
    colors = "Blues" if center is None else "RdBu_r"
    extent = (*(span or (-0.5, values.shape[1] - 0.5)), len(names) - 0.5, -0.5)
    image = axis.imshow(values, aspect="auto", cmap=colors, norm=norm, interpolation="nearest", extent=extent)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel(x_label, fontsize=8)
    axis.grid(False)
    figure.colorbar(image, ax=axis, fraction=0.03).ax.tick_params(labelsize=7)
    return _finish(figure, caption)


def _canvas(count: int, width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure as Canvas

    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Canvas(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(useOffset=False)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _finish(figure: Any, caption: str) -> Figure:
    import matplotlib

    file = io.StringIO()
    # The same drawing has the same bytes, and says nothing of the day and the machine.
    with matplotlib.rc_context({"svg.hashsalt": "hf_rb"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    return Figure(re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL).strip(), caption)
