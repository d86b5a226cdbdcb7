"""A heat map of the measured links as one inline SVG. Imports matplotlib, NumPy and the topology; knows no HTML."""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ray_ep.observe.figures import GREY, ink_on
from ray_ep.placement.links.groups import in_words
from ray_ep.placement.topology import Topology

_NUMBERS = 16  # ranks up to which each link has its number in its field


def heatmap(topology: Topology) -> str:
    """Bandwidth from rank (row) to rank (column), on a logarithmic scale, nodes parted by lines.

    Up to 16 ranks each field holds its number.
    "" where no link was measured.
    """
    n = topology.num_ranks
    known = np.isfinite(topology.bandwidth) & ~np.eye(n, dtype=bool)
    if not known.any():
        return ""
    bandwidth = np.where(known, topology.bandwidth, np.nan)
    low, high = float(np.nanmin(bandwidth)), float(np.nanmax(bandwidth))
    norm: Normalize = LogNorm(low / 1.05, high * 1.05)
    side = float(np.clip(2.2 + 0.42 * n, 5.0, 8.0))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    image = axes.imshow(bandwidth, cmap="viridis", norm=norm, interpolation="none")
    if n <= _NUMBERS:
        axes.set_xticks(range(n))
        axes.set_yticks(range(n))
        for a, b in np.argwhere(known).tolist():
            text = in_words(float(bandwidth[a, b])).replace(" ", "\n")
            ink = ink_on(image.to_rgba(bandwidth[[a], [b]])[0].tolist())
            axes.text(b, a, text, ha="center", va="center", color=ink, fontsize=6.5 if n > 8 else 8)
    for edge in np.flatnonzero(np.diff(topology.node_of)).tolist():
        axes.axhline(edge + 0.5, color=GREY, linewidth=1.2)
        axes.axvline(edge + 0.5, color=GREY, linewidth=1.2)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    ticks = np.geomspace(low, high, 4 if high > 1.5 * low else 1)
    bar.set_ticks(list(ticks), labels=[in_words(float(t)) for t in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(colors=GREY, labelcolor=GREY)
    bar.outline.set_visible(False)
    axes.set_xlabel("to rank", color=GREY)
    axes.set_ylabel("from rank", color=GREY)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "topology"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'( id="|url\(#|href="#)', r"\g<1>topology-", svg)
    return svg[svg.index("<svg") :].replace("<svg ", '<svg role="img" aria-label="topology" ', 1)
