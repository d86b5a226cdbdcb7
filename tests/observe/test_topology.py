import re
from xml.etree import ElementTree

import numpy as np

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
