"""The plots of the page: each function returns one inline SVG, or "" where there is nothing to draw.

Only the object-oriented Figure of matplotlib, no pyplot. Transparent ground and mid-grey axes read on light and dark.
Imports matplotlib, NumPy and the run's figures; knows no HTML.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_ep.observe.breakdown import Phase
from ray_ep.observe.routing import load_ratio
from ray_ep.observe.state import RunState

GREY, BLUE, ORANGE, GREEN = "#808890", "#3b82f6", "#f08c2e", "#2aa876"
"""Colours. The pages' style sheets give text of this grey, and no other, the colour that goes with their ground."""

_DIVERGING = LinearSegmentedColormap.from_list("load", ["#1d4ed8", "#7fb0f5", "#e8eaed", "#f5b06a", "#c2410c"])
_POINTS = 600  # a longer curve is averaged in blocks, so that a page stays small
_LINES = 100  # events marked on a curve, the newest
_GAP = 0.0012  # of the bar, between two fields
_SMALL = 9.0  # points, of text inside a field
_HALF, _FULL = (6.0, 3.0), (12.4, 3.0)  # inches: half the page's width, and all of it


def loss(run: RunState) -> str:
    """Loss of each step, and of the held-out split where it was evaluated."""
    figure, axes = _figure(_HALF)
    steps = run.steps.column("step")
    drawn = _curve(axes, steps, run.steps.column("loss"), BLUE, "train")
    drawn |= _curve(axes, steps, run.steps.column("eval_loss"), ORANGE, "held out", marker="o", markersize=3.5)
    _mark_events(axes, run)
    return _finish(figure, axes, "loss", "nats per token") if drawn else ""


def step_time(run: RunState) -> str:
    """Seconds of a step, split into exchange, experts and the rest."""
    columns = [run.steps.column(name) for name in ("exchange_seconds", "expert_seconds", "step_seconds")]
    exchange, experts, whole = (np.nan_to_num(c) for c in columns)
    known = np.isfinite(columns[2])
    if not known.any():
        return ""
    parts = [exchange, experts, np.maximum(whole - exchange - experts, 0.0)]
    x, *stack = _thinned(run.steps.column("step")[known], *(p[known] for p in parts))
    figure, axes = _figure(_HALF)
    labels = ["exchange", "experts", "rest"]
    axes.stackplot(x, *stack, labels=labels, colors=[ORANGE, BLUE, GREY], alpha=0.85, linewidth=0)
    axes.set_ylim(0, _top(np.sum(stack, axis=0)))
    return _finish(figure, axes, "step-time", "seconds", legend="upper right")


def step_bar(phases: Sequence[Phase]) -> str:
    """The phases of a step as one bar: names where they fit into their fields, and all of them under the pointer."""
    figure, axes = _figure((_FULL[0], 1.5))
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    ends = np.cumsum([1e3 * p.seconds for p in phases])
    gap = _GAP * ends[-1]
    for i, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        width = 1e3 * phase.seconds
        (field,) = axes.barh(0, max(width - gap, 0.7 * width), left=end - width, color=phase.colour, linewidth=0)
        field.set_gid(f"field{i}")
        lines = [*phase.name.split("_", 1), f"{phase.share:.0%}"]
        wide = 0.62 * _SMALL * max(map(len, lines))  # points; wide, for the reader's font is not known
        if wide < 0.9 * phase.share * 72 * _FULL[0] and phase.name.isascii() and phase.name.isprintable():
            style: dict[str, Any] = {
                "color": ink_on(to_rgb(phase.colour)),
                "size": _SMALL,
                "ha": "center",
                "va": "center",
            }
            for k, line in enumerate(lines):  # one by one: each is then centred in the reader's font too
                y = 0.14 * ((len(lines) - 1) / 2 - k)
                axes.text(end - (width + gap) / 2, y, line, parse_math=False, **style)
    axes.set_xlim(0, ends[-1])
    svg = _finish(figure, axes, "step-phases", "", x="milliseconds")
    for i, phase in enumerate(phases):
        said = escape(f"{phase.name}: {1e3 * phase.seconds:.2f} ms, {phase.share:.1%}")
        svg = svg.replace(f'<g id="step-phases-field{i}">', f'<g id="step-phases-field{i}"><title>{said}</title>', 1)
    return svg


def throughput(run: RunState) -> str:
    """Tokens per second of each step, over all ranks."""
    figure, axes = _figure(_HALF)
    values = run.steps.column("tokens_per_second")
    drawn = _curve(axes, run.steps.column("step"), values, GREEN, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(0, None)
    _mark_events(axes, run)
    return _finish(figure, axes, "throughput", "tokens/s") if drawn else ""


def worst_load(run: RunState) -> str:
    """Of each step, the worst layer's max/mean expert load."""
    worst = [_worst(line.get("max_expert_load")) for line in run.steps.rows]
    figure, axes = _figure(_HALF)
    drawn = _curve(axes, run.steps.column("step"), np.array(worst, dtype=np.float64), ORANGE, "")
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    return _finish(figure, axes, "worst-load", "max / mean") if drawn else ""


def expert_load(load: np.ndarray) -> str:
    """Heat map of load [L, E] over its layer's mean, with each layer's max/mean beside it."""
    ratio = load_ratio(load)
    layers = len(ratio)
    figure, axes = _figure((_FULL[0], min(1.4 + 0.35 * layers, 12.0)))
    _heatmap(figure, axes, ratio, "load / mean")
    shown = range(0, layers, -(-layers // 40))
    axes.set_yticks(list(shown))
    for layer in shown:
        worst = f"{ratio[layer].max():.2f}"
        axes.text(1.008, layer, worst, transform=axes.get_yaxis_transform(), va="center", color=GREY)
    axes.text(1.008, 1.02, "max / mean", transform=axes.transAxes, va="bottom", color=GREY)
    return _finish(figure, axes, "expert-load", "MoE layer", x="expert")


def coactivation(ratio: np.ndarray) -> str:
    """Heat map of one layer's observed / expected pairs, ratio [E, E]."""
    figure, axes = _figure((7.2, 6.0))
    _heatmap(figure, axes, ratio, "observed / expected")
    axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_aspect("equal")
    return _finish(figure, axes, "coactivation", "expert", x="expert")


def ink_on(ground: Sequence[float]) -> str:
    """Black or white, whichever is read better on a colour (red, green, blue, ..., each 0 to 1).

    By relative luminance, as WCAG 2 has it: the two contrasts are equal at 0.179.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground[:3]]
    return "#000000" if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.179 else "#ffffff"


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=GREY, labelcolor=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    return figure, axes


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str, **style: Any) -> bool:
    """Draw the finite points; False if there is none."""
    known = np.isfinite(y)
    if not known.any():
        return False
    if known.sum() == 1:
        style.setdefault("marker", "o")
    axes.plot(*_thinned(x[known], y[known]), color=color, label=label or None, linewidth=1.6, **style)
    axes.grid(True, axis="y", color=GREY, alpha=0.2)
    return True


def _thinned(*columns: np.ndarray) -> list[np.ndarray]:
    block = -(-len(columns[0]) // _POINTS)
    starts = np.arange(0, len(columns[0]), block)
    counts = np.diff(np.append(starts, len(columns[0])))
    return [np.add.reduceat(c, starts) / counts for c in columns]


def _mark_events(axes: Axes, run: RunState) -> None:
    """A dotted line at each step with an event: a dent in a curve often has its reason there."""
    first, last = (run.steps.rows[0]["step"], run.steps.rows[-1]["step"]) if run.steps.rows else (0, -1)
    steps = {
        e["step"] for e in run.events.newest if isinstance(e.get("step"), (int, float)) and first < e["step"] <= last
    }
    for step in sorted(steps)[-_LINES:]:
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")


def _top(values: np.ndarray) -> float:
    """Upper end of an axis that one slow step (the first, as a rule) must not flatten."""
    usual = 1.6 * float(np.quantile(values, 0.95))
    return max(min(usual, 1.15 * float(values.max())), 1e-6)


def _worst(value: Any) -> float:
    known = [v for v in value if isinstance(v, (int, float))] if isinstance(value, list) else []
    return max(known, default=float("nan"))


def _reach(ratio: np.ndarray) -> float:
    """How many doublings the colours of a heat map of ratio span to each side, 1 to 3."""
    finite = ratio[np.isfinite(ratio) & (ratio > 0)]
    return float(np.clip(np.abs(np.log2(finite)).max(), 1.0, 3.0)) if finite.size else 1.0


def _heatmap(figure: Figure, axes: Axes, ratio: np.ndarray, label: str, reach: float | None = None) -> None:
    """An image of ratio [rows, columns] on a logarithmic scale around 1: twice and half are equally far from white.

    `reach` of several maps that are to be compared; None: of this one.
    """
    reach = _reach(ratio) if reach is None else reach
    norm = LogNorm(2.0**-reach, 2.0**reach)
    image = axes.imshow(np.maximum(ratio, 1e-9), cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="none")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    powers = np.arange(np.ceil(-reach), np.floor(reach) + 1)
    bar.set_ticks(list(2.0**powers), labels=[f"{2.0**p:g}" for p in powers])
    bar.minorticks_off()
    bar.set_label(label, color=GREY)
    bar.ax.tick_params(colors=GREY, labelcolor=GREY)
    bar.outline.set_visible(False)


def _finish(figure: Figure, axes: Axes, name: str, y: str, x: str = "step", legend: Any = "best") -> str:
    """Label the axes and return the SVG; ids begin with `name`, for all figures share one page."""
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=GREY, loc=legend, ncols=3)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
