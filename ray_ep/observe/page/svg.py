"""A heat map as an SVG file. Bokeh draws in browsers only, so these few rectangles are written here. NumPy alone."""

from __future__ import annotations

from html import escape

import numpy as np

from ray_ep.observe.page.sheet import Heat

_LOAD = ("#1e40af", "#5b8def", "#e3e6ea", "#f0953f", "#b4330a")
_AMOUNT = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d9c715")
_GREY = "#808890"
_LEFT, _TOP, _BOTTOM, _SIDE = 60, 34, 44, 480  # pixels: for words left, above and below; the longer side of the map


def heat_svg(heat: Heat) -> str:
    """The map with its title, its axes' words and the range of its colours, on any ground."""
    rows, columns = heat.values.shape
    width, height = _SIDE, max(120.0, min(float(_SIDE), 22.0 * rows))
    w, h = width / max(columns, 1), height / max(rows, 1)
    fields = [
        f'<rect x="{_LEFT + c * w:.2f}" y="{_TOP + r * h:.2f}" width="{w:.2f}" height="{h:.2f}" '
        f'fill="{_colour(heat, float(heat.values[r, c]))}"><title>{escape(heat.rows)} {r}, {escape(heat.columns)} {c}: '
        f"{heat.values[r, c]:.4g} {escape(heat.unit)}</title></rect>"
        for r in range(rows)
        for c in range(columns)
    ]
    low = 1 / heat.reach if heat.ratio else 0.0
    said = f"{low:.3g} to {heat.reach:.3g} {heat.unit}"
    words = [
        _text(_LEFT, 20, heat.title, 14),
        _text(_LEFT, _TOP + height + 18, f"{heat.columns} 0 to {columns - 1}; colours: {said}", 12),
        f'<g transform="rotate(-90 18 {_TOP + height / 2:.0f})">{_text(18, _TOP + height / 2, heat.rows, 12)}</g>',
    ]
    size = f'width="{_LEFT + width + 10:.0f}" height="{_TOP + height + _BOTTOM:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(heat.title)}" '
        f'shape-rendering="crispEdges" font-family="sans-serif">{"".join([*fields, *words])}</svg>\n'
    )


def _text(x: float, y: float, words: str, size: int) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{_GREY}">{escape(words)}</text>'


def _colour(heat: Heat, value: float) -> str:
    """Between the stops of the map's colours, by doublings for a ratio."""
    if not np.isfinite(value):
        return "none"
    if heat.ratio:
        at = 0.5 + 0.5 * np.log2(max(value, 1e-9)) / np.log2(heat.reach)
    else:
        at = value / heat.reach
    stops = _LOAD if heat.ratio else _AMOUNT
    place = float(np.clip(at, 0.0, 1.0)) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    ends = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops[left : left + 2]]
    mixed = [round(a + (b - a) * (place - left)) for a, b in zip(*ends, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)
