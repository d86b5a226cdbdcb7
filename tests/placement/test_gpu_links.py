"""What the driver of the GPUs says beside what Ray says and what was measured."""

import numpy as np
import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement.links.gpu_links import NVLINK, PCIE, SAME, GpuLinks, joined
from ray_ep.placement.links.groups import contradictions, find_groups
from ray_ep.placement.topology import Topology


def links(fast, size, node_of, said):
    """A topology whose pairs in `fast` have 200 GB/s, the others 10, and what drivers say, by pair."""
    bandwidth, kinds = np.full((size, size), 10e9), np.zeros((size, size), int)
    for a, b in fast:
        bandwidth[a, b] = bandwidth[b, a] = 200e9
    for (a, b), kind in said.items():
        kinds[a, b] = kinds[b, a] = kind
    return find_groups(Topology(bandwidth, np.full((size, size), 1e-6), node_of, joined=kinds))


def test_what_the_machines_say_is_put_together():
    left = [GpuLinks("a", {"b": NVLINK}), GpuLinks("b", {"a": NVLINK}), GpuLinks("b", {"a": NVLINK})]
    right = [GpuLinks("c", {"d": PCIE}, "rack/1"), GpuLinks("d", {}, "rack/2"), None, GpuLinks("x", {}, "rack/1")]
    found = joined(left + right)
    n, p, s = NVLINK, PCIE, SAME
    assert found.tolist() == [
        [0, n, n, 0, 0, 0, 0],
        [n, 0, s, 0, 0, 0, 0],  # two ranks on one GPU
        [n, s, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, p, 0, n],  # one fabric over two machines
        [0, 0, 0, p, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],  # no driver there
        [0, 0, 0, n, 0, 0, 0],
    ]
    assert joined([None, None]) is None


def test_where_all_agree_nothing_is_said():
    pairs = [(0, 1), (2, 3)]
    assert contradictions(links(pairs, 4, [0, 0, 1, 1], dict.fromkeys(pairs, NVLINK))) == []
    assert contradictions(links(pairs, 4, [0, 0, 1, 1], {})) == []


def test_nvlink_that_the_measured_groups_do_not_know_is_named():
    t = links([(0, 1), (2, 3)], 4, [0, 0, 1, 1], dict.fromkeys([(0, 1), (2, 3), (1, 2)], NVLINK))
    assert t.groups.tolist() == [0, 0, 1, 1]
    words = contradictions(t)
    assert words[-1] == (
        "ranks 1 and 2 are said to be joined by NVLink but by measurement they are in different groups of fast links: "
        "theirs has 10 GB/s"
    )
    assert any("others of that kind have 200 GB/s" in w for w in words)


def test_ranks_of_one_node_whose_driver_knows_but_one_of_them_are_named():
    everybody = [(a, b) for a in range(4) for b in range(a)]
    t = links(everybody, 4, [0, 0, 0, 0], {(0, 1): NVLINK, (2, 3): NVLINK})
    assert contradictions(t) == [
        f"ranks {a} and {b} are said to share node 0 but the driver of rank {a}'s GPU does not know rank {b}'s"
        for a, b in ((0, 2), (0, 3), (1, 2), (1, 3))
    ]


def test_what_is_said_is_kept_with_the_topology():
    t = links([(0, 1)], 3, [0, 0, 1], {(0, 1): NVLINK})
    assert Topology.from_json(t.to_json()).joined.tolist() == t.joined.tolist()
    with pytest.raises(PlacementError, match="joined"):
        Topology(t.bandwidth, t.latency, t.node_of, joined=np.zeros((2, 2)))
