"""The heat maps of a plan and the page that holds them: expert load of ranks, traffic of links, before and after.

The page holds simulated clusters, too, and how what a GPU brings falls with their number.

Imports matplotlib, jinja2 and the placement layer; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_ep.observe.figures import GREY, _figure, _finish, _heatmap, _reach
from ray_ep.placement.compare import PLAN, Candidate, Case, link_bytes

_EACH = 128  # ranks up to which links are drawn one by one; beyond, between nodes

Map = tuple[str, str, str]
"""Name (of its file, too), title, SVG."""


def heat_maps(case: Case, found: Sequence[Candidate], now: str) -> list[Map]:
    """Heat maps of what runs now and of the plan, the colours of a kind meaning the same in both."""
    shown = [c for c in found if c.name in (now, PLAN)]
    ratios = {c.name: _over_mean(c.prediction.rank_load / case.costs.speeds(case.topology.num_ranks)) for c in shown}
    reach = max(map(_reach, ratios.values()))
    maps = [(f"load-{n}", f"Load of ranks, {n}", rank_load(r, reach, f"load-{n}")) for n, r in ratios.items()]
    if not case.statistics.tells_visits:
        return maps
    traffic = {c.name: link_bytes(case, c.placement) for c in shown}
    drawn = {name: _by_node(case, sent) for name, sent in traffic.items()}
    top = max(float(sent.max(initial=0.0)) for sent in drawn.values())
    far = case.topology.node_of[:, None] != case.topology.node_of
    for name, sent in traffic.items():
        title = f"Traffic, {name}: {sent.sum() / 1e6:,.0f} MB a step, {sent[far].sum() / 1e6:,.0f} MB between nodes"
        maps.append((f"traffic-{name}", title, link_traffic(drawn[name], top, case, f"traffic-{name}")))
    return maps


def _over_mean(load: np.ndarray) -> np.ndarray:
    """load [L, R] over its layer's mean; 1 where a layer has none."""
    mean = load.mean(1, keepdims=True)
    ratio: np.ndarray = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return ratio


def rank_load(ratio: np.ndarray, reach: float, name: str) -> str:
    """Heat map of load (for its rank's speed) over its layer's mean, ratio [L, R]."""
    figure, axes = _figure((6.0, min(1.6 + 0.3 * len(ratio), 8.0)))
    _heatmap(figure, axes, ratio, "load / mean", reach)
    axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    return _finish(figure, axes, name, "MoE layer", x="rank")


def link_traffic(sent: np.ndarray, top: float, case: Case, name: str) -> str:
    """Heat map of bytes that a rank (or node, row) sends to another in a step; nodes are parted by lines."""
    unit = "rank" if len(sent) == case.topology.num_ranks else "node"
    figure = Figure(figsize=(6.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=GREY, labelcolor=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    image = axes.imshow(sent / 1e6, cmap="viridis", vmin=0.0, vmax=max(top / 1e6, 1e-9), interpolation="none")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(16, integer=True))
    if unit == "rank":
        for edge in np.flatnonzero(np.diff(case.topology.node_of)).tolist():
            axes.axhline(edge + 0.5, color=GREY, linewidth=0.8)
            axes.axvline(edge + 0.5, color=GREY, linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("MB a step, one way", color=GREY)
    bar.ax.tick_params(colors=GREY, labelcolor=GREY)
    bar.outline.set_visible(False)
    return _finish(figure, axes, name, f"from {unit}", x=f"to {unit}")


def growth(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Map:
    """Tokens/s of a GPU over the number of GPUs, (GPUs, tokens/s) of each line by its name."""
    figure, axes = _figure((6.0, 3.4))
    for points in lines.values():
        ranks, tokens = zip(*sorted(points), strict=True)
        axes.plot(ranks, tokens, marker="o", linewidth=1.6)
    for line, name in zip(axes.lines, lines, strict=True):
        line.set_label(name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0.0)
    axes.grid(True, axis="y", color=GREY, alpha=0.2)
    return (
        "growth",
        "What a GPU brings in clusters of many",
        _finish(figure, axes, "growth", "tokens/s a GPU", x="GPUs"),
    )


def page(
    notes: Sequence[str],
    table: Sequence[Sequence[str]],
    legend: str,
    words: Sequence[str],
    maps: Sequence[Map],
    title: str = "Placements compared",
    words_title: str = "Advice",
) -> str:
    """One self-contained HTML page; the table's first row is its head."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("plan.html").render(
        title=title,
        words_title=words_title,
        notes=notes,
        head=table[0],
        rows=table[1:],
        legend=legend,
        words=words,
        maps=[(title, Markup(svg)) for _, title, svg in maps],
    )


def _by_node(case: Case, sent: np.ndarray) -> np.ndarray:
    """[R, R] as it is, or summed to [N, N] where ranks are too many to see; what stays on a node is left out then."""
    if len(sent) <= _EACH:
        return sent
    node_of = np.unique(case.topology.node_of, return_inverse=True)[1]
    member = np.eye(int(node_of.max()) + 1)[node_of]  # [R, N]
    nodes = member.T @ sent @ member
    np.fill_diagonal(nodes, 0.0)
    return np.asarray(nodes)
