"""Curves as an SVG file, with nothing but the standard library."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path


__all__ = ["plot_curves"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 240, 70, 20, 40, 45


def plot_curves(path: str | Path, x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str) -> None:
    """
    Draws one panel for each curve, one below the other, over the same x.

    Args:
        path (`str` or `Path`):
            SVG file to write.
        x (`Sequence[float]`):
            Places on the horizontal axis, in any order.
        curves (`Mapping[str, Sequence[float]]`):
            The values over `x` by what they are.
        x_label (`str`):
            What `x` is.
    """
    panels = [
        f'<g transform="translate(0 {number * HEIGHT})">{_panel(name, sorted(zip(x, y, strict=True)), x_label)}</g>'
        for number, (name, y) in enumerate(curves.items())
    ]
    size = f'width="{WIDTH}" height="{HEIGHT * len(panels)}" viewBox="0 0 {WIDTH} {HEIGHT * len(panels)}"'
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(panels)}</svg>\n'
    Path(path).write_text(svg, encoding="utf-8")


def _panel(name: str, points: list[tuple[float, float]], x_label: str) -> str:
    xs, ys = zip(*points, strict=True)
    place_x, place_y = _scale(xs, LEFT, WIDTH - RIGHT), _scale(ys, HEIGHT - BOTTOM, TOP)
    parts = [f'<text x="{LEFT}" y="{TOP - 18}" font-weight="bold">{escape(name)}</text>']
    for value in sorted({min(ys), max(ys)}):
        y = place_y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in xs:
        parts.append(
            f'<text x="{place_x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    places = [(place_x(x), place_y(y)) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f6feb"/>' for x, y in places]
    return "".join(parts)


def _scale(values: Sequence[float], start: float, stop: float):
    low, high = min(values), max(values)
    span = high - low or 1
    return lambda value: start + (stop - start) * (value - low) / span
