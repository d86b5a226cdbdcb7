"""The heat map of the links."""

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import ray_ep.observe
from ray_ep.observe.figures import GREY, ink_on
from ray_ep.observe.topology import heatmap
from ray_ep.placement import Topology


def test_the_heat_map_holds_the_number_of_each_link_and_parts_the_nodes():
    bandwidth = np.array([[1.0, 3.1e9, 1.2e7], [2.9e9, 1.0, 1.3e7], [1.4e7, 1.5e7, 1.0]])
    svg = heatmap(Topology(bandwidth, np.zeros((3, 3)), [0, 0, 1]))
    ElementTree.fromstring(svg)
    words = re.findall(r"<text[^>]*>([^<]*)</text>|<tspan[^>]*>([^<]*)</tspan>", svg)
    numbers = {w for pair in words for w in pair}
    assert {"3.1", "12", "2.9", "13", "14", "15"} <= numbers
    assert "from rank" in numbers
    assert 'aria-label="topology"' in svg
    assert svg == heatmap(Topology(bandwidth, np.zeros((3, 3)), [0, 0, 1])), "the same topology, the same bytes"


def test_many_ranks_have_colours_only_and_an_unmeasured_topology_nothing():
    n = 64
    node_of = np.repeat(np.arange(8), 8)
    bandwidth = np.where(node_of[:, None] == node_of[None], 1e11, 1e9)
    svg = heatmap(Topology(bandwidth, np.zeros((n, n)), node_of))
    assert "<image" in svg
    assert len(svg) < 100_000
    assert heatmap(Topology.of_nodes([0, 1])) == ""
    assert "<svg" in heatmap(Topology(np.full((2, 2), 1e9), np.zeros((2, 2)), [0, 1]))


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", ["viridis", "gray", "coolwarm"])
def test_a_label_is_readable_on_every_colour_of_a_map(name):
    for ground in matplotlib.colormaps[name](np.linspace(0, 1, 256)):
        light, dark = sorted([luminance(ground), luminance(to_rgb(ink_on(ground)))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.4


def test_the_pages_recolour_the_grey_of_axes_only_so_that_labels_keep_their_own_colour():
    b = np.array([[1.0, 3.1e9], [1.2e7, 1.0]])
    fills = re.findall(r"<text style=\"[^\"]*fill: (#\w+)", heatmap(Topology(b, np.zeros((2, 2)), [0, 1])))
    assert set(fills) == {GREY, "#ffffff"}  # black is what an SVG has by itself
    for page in ("report.html", "plan.html"):
        text = (Path(ray_ep.observe.__file__).parent / page).read_text()
        assert re.findall(r"(.*svg text.*) \{ fill: .*!important", text) == [f'figure svg text[style*="{GREY}"]']
