"""A cluster in words becomes links; every slip of the pen is named."""

import numpy as np
import pytest
import yaml

from ray_ep.errors import PlacementError
from ray_ep.placement.whatif.description import bytes_per_second, describe, seconds

LINKS = {
    "inside": {"bandwidth": "300 GB/s", "latency": "5 us"},
    "across": {"bandwidth": "400 Gbit/s", "latency": 2e-5},
    "slow": {"bandwidth": 1e9, "latency": "1 ms"},
}


def test_nodes_links_and_speeds_of_a_plain_cluster():
    found = describe({"nodes": 2, "ranks_per_node": 2, "links": LINKS, "speeds": [1, 0.5]})
    topology = found.topology
    assert topology.node_of.tolist() == [0, 0, 1, 1]
    assert topology.bandwidth[0].tolist() == [np.inf, 300e9, 50e9, 50e9]
    assert topology.latency[0].tolist() == pytest.approx([0.0, 5e-6, 2e-5, 2e-5])
    assert found.speed == (1.0, 1.0, 0.5, 0.5)


def test_unlike_nodes_with_links_of_their_own():
    found = describe(
        yaml.safe_load("""
        nodes:
          - {name: big, ranks: 3, count: 2}
          - {name: old, ranks: 1, speed: 0.5}
          - {name: odd, ranks: 2, inside: slow}
        links:
          inside: {bandwidth: 3e11, latency: 5 us}
          across: {bandwidth: 25e9}
          slow: {bandwidth: 8 Gbit/s, latency: 1 ms}
        between:
          - {nodes: [big-0, old], link: slow}
        """)
    )
    assert found.names == ("big-0", "big-1", "old", "odd")
    assert found.topology.node_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    b = found.topology.bandwidth
    assert (b[0, 1], b[0, 3], b[0, 6], b[6, 0], b[3, 6], b[7, 8]) == (3e11, 25e9, 1e9, 1e9, 25e9, 1e9)
    assert found.speed == (1.0,) * 6 + (0.5, 1.0, 1.0)
    assert describe({"nodes": 1, "ranks_per_node": 4, "links": LINKS}).speed is None


def test_network_cards_that_ranks_share():
    assert describe({"nodes": 2, "ranks_per_node": 2, "links": LINKS}).topology.lanes is None
    assert describe({"nodes": 2, "ranks_per_node": 2, "links": LINKS, "lanes": 1}).topology.lanes.tolist() == [1.0] * 4
    nodes = [{"ranks": 4, "lanes": 2}, {"ranks": 2}]
    assert describe({"nodes": nodes, "links": LINKS}).topology.lanes.tolist() == [2.0] * 4 + [2.0] * 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("25 GB/s", 25e9), ("25GB/s", 25e9), ("100 Mbit/s", 12.5e6), ("10Gbps", 1.25e9), ("2 GiB/s", 2 * 2**30), (7, 7.0)],
)
def test_units_of_bandwidth(text, value):
    assert bytes_per_second(text) == value


def test_units_of_time():
    assert [seconds(x) for x in ("2 s", "3 ms", "4us", "5 ns", 0, "1e-3")] == pytest.approx(
        [2, 3e-3, 4e-6, 5e-9, 0, 1e-3]
    )


def plain(**changes):
    return {"nodes": 2, "ranks_per_node": 2, "links": LINKS, **changes}


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ([1], "is no mapping"),
        (plain(speed=1), "unknown key 'speed': allowed are nodes"),
        (plain(nodes=0), "nodes=0: expected a number from 1"),
        (plain(nodes="two"), "nodes='two'"),
        (plain(nodes=[3]), r"nodes\[0\]: 3: expected a mapping with name"),
        (plain(nodes=[{"rank": 3}]), r"nodes\[0\]: unknown key 'rank'"),
        (plain(nodes=4096), "more than 4096 ranks"),
        ({"nodes": 2, "links": LINKS}, "no ranks: give ranks here or ranks_per_node"),
        (plain(nodes=[{"name": "a"}, {"name": "a"}]), "two nodes have one name"),
        (plain(nodes=[{"inside": "nvlink"}]), "no such kind of link: allowed are inside, across, slow"),
        (plain(links={"inside": LINKS["inside"]}), "expected a mapping with inside, across"),
        (plain(links={**LINKS, "across": 5}), "links: across: 5"),
        (plain(links={**LINKS, "across": {"bandwidth": float("nan")}}), "across: bandwidth=nan: expected a positive"),
        (plain(links={**LINKS, "across": {"bandwidth": "-3 GB/s"}}), "across: bandwidth='-3 GB/s'"),
        (plain(links={**LINKS, "across": {"bandwidth": 0}}), "bandwidth=0: expected a positive"),
        (plain(links={**LINKS, "across": {"bandwidth": "25 parsecs"}}), "25 parsecs"),
        (plain(links={**LINKS, "across": {"bandwidth": 1, "latency": -1}}), "latency=-1: expected a time"),
        (plain(links={**LINKS, "across": {"bandwidth": 1, "delay": 1}}), "unknown key 'delay'"),
        (plain(lanes=0.5), r"nodes\[0\]: lanes=0.5: expected a number from 1 to the node's 2 ranks"),
        (plain(lanes="few"), "lanes='few'"),
        (plain(speeds=[1]), "expected a list of 2 numbers"),
        (plain(speeds=[1, 0]), r"speeds\[1\]=0: expected a positive"),
        (plain(between=3), "expected a list of"),
        (plain(between=[{"nodes": [0, 0], "link": "slow"}]), "two different nodes"),
        (plain(between=[{"nodes": [0, 2], "link": "slow"}]), "no node 2: allowed are 0, 1"),
        (plain(between=[{"nodes": [0, 1], "link": "fast"}]), "link='fast': no such kind of link"),
    ],
)
def test_a_wrong_description_is_named_with_what_is_allowed(tree, says):
    with pytest.raises(PlacementError, match=f"lab.yaml.*{says}"):
        describe(tree, "lab.yaml")
