"""The table of links: each among few ranks, classes and exceptions among many."""

from dataclasses import replace

import numpy as np

from ray_ep.placement import Topology
from ray_ep.placement.links.groups import best_of, contradictions
from ray_ep.placement.links.rows import HEAD, link_rows, shared_cards


def two_kinds(node_of, inside, across):
    node_of = np.asarray(node_of)
    near = node_of[:, None] == node_of[None]
    return Topology(np.where(near, inside, across), np.where(near, 1e-6, 1e-4), node_of)


def test_few_ranks_have_a_row_a_direction():
    topology = two_kinds([0, 0, 1], 2e9, 1e8)
    rows = link_rows(replace(topology, spread=np.full((3, 3), 0.05)))
    assert [r.name for r in rows][:3] == [
        "rank 0 to 1, in node 0",
        "rank 0 to 2, node 0 to 1",
        "rank 1 to 0, in node 0",
    ]
    assert len(rows) == 6
    assert rows[1].cells() == ("rank 0 to 2, node 0 to 1", "1", "100 MB/s", "", "100 us", "5%")
    assert len(HEAD) == len(rows[0].cells())


def test_many_ranks_have_classes_and_the_links_that_are_slow_beside_theirs():
    topology = two_kinds(np.repeat([0, 1, 2], 4), 2e9, 1e8)
    topology.bandwidth[0, 5] = 2e7
    topology.bandwidth[2, 1] = 9e8
    rows = link_rows(topology)
    assert [(r.name, r.links, r.bandwidth) for r in rows] == [
        ("inside nodes", 36, 2e9),
        ("between nodes", 96, 1e8),
        ("rank 0 to 5, node 0 to 1", 1, 2e7),
        ("rank 2 to 1, in node 0", 1, 9e8),
    ]
    assert rows[1].lowest == 2e7
    assert rows[0].cells()[3] == "900 MB/s to 2 GB/s"


def test_what_was_not_measured_has_no_row():
    assert link_rows(Topology.of_nodes([0, 0, 1])) == []
    assert link_rows(Topology.of_nodes([0] * 12)) == []


def test_of_two_measurements_the_faster_of_each_link_counts_and_a_disturbance_is_gone():
    first, second = two_kinds([0, 0, 0, 0, 1], 2e9, 1e8), two_kinds([0, 0, 0, 0, 1], 2e9, 1e8)
    first.bandwidth[0, 3] = 1e8  # disturbed once
    second.bandwidth[2, 0] = 1e8  # and elsewhere
    for t in (first, second):
        t.bandwidth[1, 2] = t.bandwidth[2, 1] = 1e8  # slow indeed
    assert len(contradictions(first)) == 2
    best = best_of(first, second)
    assert best.bandwidth[[0, 2, 1], [3, 0, 2]].tolist() == [2e9, 2e9, 1e8]
    (words,) = contradictions(best)
    assert words.startswith("ranks 1 and 2 are said to share node 0 but their link has 100 MB/s")
    assert best.groups.tolist() == [0, 0, 0, 0, 1]
    assert best_of(best, first).bandwidth.tolist() == best.bandwidth.tolist()


def test_nodes_whose_ranks_share_the_network_have_a_sentence():
    topology = two_kinds([0, 0, 1, 1], 2e9, 1e8)
    assert shared_cards(topology) == []
    assert shared_cards(replace(topology, lanes=np.array([1.04, 1.04, 2, 2]))) == [
        "node 0: 2 ranks share the network: together they send as fast as 1 alone"
    ]


def test_a_latency_of_many_microseconds_is_written_out():
    topology = Topology(np.full((2, 2), 1e9), np.array([[0, 1.04e-3], [5e-6, 0]]), [0, 1])
    assert [row.cells()[4] for row in link_rows(topology)] == ["1,040 us", "5 us"]
