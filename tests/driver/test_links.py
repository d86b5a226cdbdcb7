"""A link that slows is measured, one that recovers is looked for: with ranks and exchanges of the test's own."""

import itertools
import re

import numpy as np
import pytest

from ray_ep.driver.rebalance.links import LOOKED_AT, QUIET, Links, changed_links
from ray_ep.driver.rebalance.recent import MeasuredStep
from ray_ep.errors import PlacementError
from ray_ep.placement import Topology
from ray_ep.placement.links.gpu_links import LINK_KINDS

RANKS = 3


def topology(*slow, ranks=RANKS, node_of=None):
    """All links of 100 MB/s but for (source, destination, bytes/s); each rank on a node of its own, unless said."""
    bandwidth = np.full((ranks, ranks), 1e8)
    for a, b, rate in slow:
        bandwidth[a, b] = rate
    return Topology(
        bandwidth,
        np.full((ranks, ranks), 1e-5),
        np.arange(ranks) if node_of is None else np.array(node_of),
        measured=~np.eye(ranks, dtype=bool),
    )


class FakeRanks:
    """Ranks on links that the test changes; remembers what was asked, with the links that were."""

    def __init__(self, links):
        self.links, self.asked = links, []

    def topology(self):
        return self.links

    def gpu_links(self):
        return [None] * RANKS

    def probe(self, node_of, budget):
        self.asked.append(("probe", node_of, budget))
        return self.links

    def probe_links(self, known, pairs, budget):
        self.asked.append(("probe_links", pairs, budget))
        bandwidth = known.bandwidth.copy()
        for a, b in pairs:
            bandwidth[a, b] = self.links.bandwidth[a, b]
        return Topology(bandwidth, known.latency, known.node_of)


class Run:
    """Steps of a run over links that the test changes."""

    def __init__(self, every=10, node_of=None):
        links = topology(node_of=node_of)
        self.ranks, self.kept, self.heard, self.done = FakeRanks(links), [], [], 0
        self.links = Links(self.ranks, links, 5.0, every, self.kept.append, self.heard.append)

    def steps(self, count, seconds=None, sent=1e6):
        """Steps after which a link had changed."""
        found = []
        for _ in range(count):
            self.done += 1
            size = np.full((RANKS, RANKS), sent)
            np.fill_diagonal(size, 0)
            took = size / self.ranks.links.bandwidth
            each = np.maximum(took.sum(0), took.sum(1)) * 1.1 if seconds is None else np.full(RANKS, seconds)
            if self.links.changed(
                self.done, MeasuredStep(np.ones((1, 3)), np.ones((3, 1)), np.ones(3), each, size, 1.0)
            ):
                found.append(self.done)
        return found

    @property
    def said(self):
        """(step, words) of what was told."""
        return [(int(re.match(r"after step (\d+):", e.words)[1]), e.words) for e in self.heard]

    def looks(self):
        """What was measured: probe, or probe_links."""
        return [name for name, *_ in self.ranks.asked]


def test_a_link_that_slows_is_named_and_one_that_recovers_is_too_though_nothing_crosses_it_any_more():
    run = Run()
    assert run.steps(12) == []
    run.ranks.links = topology((0, 2, 1e7))
    assert run.steps(8) == [17]
    assert run.said == [
        (17, "after step 17: the link from rank 0 to rank 2 is 10.0 times slower: 10 MB/s instead of 100 MB/s")
    ]
    assert run.heard[0].fields == {"changed": [{"source": 0, "destination": 2, "before": 1e8, "now": 1e7}]}
    assert run.links.slowed == {(0, 2): 1e8}
    run.links.moved()
    assert run.steps(20, seconds=0.02, sent=1e3) == []
    assert run.ranks.asked[1:] == [("probe_links", [(0, 2)], 0.5)] * 2  # at 20 and 30; the next one would be at 50
    run.ranks.links = topology()
    assert run.steps(30, seconds=0.02, sent=1e3) == [50]
    assert run.said[1:] == [
        (50, "after step 50: the link from rank 0 to rank 2 is 10.0 times faster: 100 MB/s instead of 10 MB/s")
    ]
    assert run.links.slowed == {}
    assert [t.bandwidth[0, 2] for t in run.kept] == [1e7, 1e8]
    count = len(run.ranks.asked)
    assert run.steps(40, seconds=0.02, sent=1e3) == []
    assert len(run.ranks.asked) == count


@pytest.mark.parametrize(("node_of", "asks"), [((0, 0, 0), False), ((0, 0, 1), True)])
def test_slow_exchanges_through_a_hosts_own_memory_are_not_taken_for_a_slowed_link(node_of, asks):
    run = Run(node_of=node_of)
    run.steps(12)
    run.steps(50, seconds=0.5)
    assert ("probe" in run.looks()) == asks


def test_looks_in_vain_become_rarer_and_stop_where_nothing_was_slowed():
    run = Run()
    run.steps(12)
    run.ranks.links = topology((0, 2, 1e7))
    run.steps(5)
    at = []
    for _ in range(3000):
        before = len(run.ranks.asked)
        run.steps(1)
        at += [run.done] * (len(run.ranks.asked) - before)
    assert set(run.looks()[1:]) == {"probe_links"}
    assert at[:5] == [20, 30, 50, 90, 170]
    assert max(np.diff(at)) == 320


def test_a_link_that_recovers_in_part_is_still_looked_at_and_one_that_was_always_slow_is_not():
    run = Run(every=1)
    run.ranks.links = run.links.topology = topology((1, 0, 1e6))
    run.links._measure(0)
    assert run.links.slowed == {}
    run.ranks.links = topology((1, 0, 1e6), (0, 2, 1e7))
    run.links._measure(0)
    run.ranks.links = topology((1, 0, 1e6), (0, 2, 4e7))
    assert run.steps(2) == [1]
    assert run.links.slowed == {(0, 2): 1e8}
    assert run.links.topology.bandwidth[0, 2] == 4e7


def test_of_many_slowed_links_only_the_most_slowed_are_looked_at():
    run = Run(every=1)
    ranks = 5
    slow = {(a, b): 1e6 * (1 + 5 * a + b) for a in range(ranks) for b in range(ranks) if a != b}
    run.ranks.links = topology(*[(a, b, rate) for (a, b), rate in slow.items()], ranks=ranks)
    run.links.topology = topology(ranks=ranks)
    run.links._measure(0)
    assert len(run.links.slowed) == len(slow)
    assert not run.links._recovers()
    assert run.ranks.asked[-1][1] == sorted(slow, key=slow.get)[:LOOKED_AT]


def test_measurements_in_vain_keep_quiet_for_longer_and_longer_and_what_was_suspected_then_is_measured_after():
    run, at = Run(), []
    run.steps(10)
    for level in range(1, 6):
        for _ in range(400):
            before = len(run.ranks.asked)
            run.steps(1, seconds=0.022 * 3**level)  # slow, but no link is
            at += [run.done] * (len(run.ranks.asked) - before)
            if len(at) == level:
                break
        run.steps(6, seconds=0.022 * 3**level)  # so it is usual now
    assert run.looks() == ["probe"] * 5
    assert all("found as before (suspected: link from rank" in words for _, words in run.said)
    assert all(b - a >= QUIET * 2**n for n, (a, b) in enumerate(itertools.pairwise(at)))
    assert at[1] - at[0] <= 2 * QUIET
    assert run.links.slowed == {}


def test_a_link_that_slows_while_experts_move_is_noticed():
    run = Run()
    run.steps(12)
    run.links.moved()
    run.ranks.links = topology((0, 2, 1e7))
    assert run.steps(8) == [17]


def test_a_measurement_that_finds_what_no_link_can_be_leaves_what_was_known_and_the_run_goes_on():
    run = Run()
    known, run.links._suspected = run.links.topology, "link from rank 0 to rank 1 seemed slow"

    def fails(*_):
        raise PlacementError("probe: link from rank 0 to rank 1 has nan bytes/s")

    run.ranks.probe = fails
    assert run.steps(1) == []
    assert run.links.topology is known
    assert run.said == [
        (1, "after step 1: links could not be measured, what is known of them stays: probe: link from rank 0 to rank 1 "
         "has nan bytes/s")
    ]  # fmt: skip
    assert run.steps(QUIET - 2) == []
    assert len(run.said) == 1, "it is not tried again in the next steps"


def test_a_suspicion_of_a_quiet_time_is_not_forgotten():
    run = Run()
    run.steps(12)
    run.steps(5, seconds=0.1)
    assert run.looks() == ["probe"]  # in vain: quiet until 27
    run.steps(5)
    run.ranks.links = topology((0, 2, 1e6))
    assert run.steps(20) == [27]


def test_changed_links_come_the_most_changed_first():
    old, new = topology(), topology((0, 1, 2e8), (1, 0, 1e7), (1, 2, 0.9e8))
    assert changed_links(old, new) == {(1, 0): pytest.approx(10), (0, 1): pytest.approx(0.5)}
    assert changed_links(old, old) == {}
    assert changed_links(Topology.of_nodes([0, 1]), Topology.of_nodes([0, 1])) == {}


@pytest.mark.parametrize(("joined", "factor", "changes"), [(None, 2, False), (None, 6, True), ("NVLink", 2, True)])
def test_inside_a_node_the_host_must_be_much_slower_but_a_link_between_gpus_need_not(joined, factor, changes):
    def links(rate):
        kinds = None if joined is None else np.full((2, 2), LINK_KINDS.index(joined))
        return Topology(np.full((2, 2), rate), np.full((2, 2), 1e-5), np.zeros(2), joined=kinds)

    assert bool(changed_links(links(1e10), links(1e10 / factor))) == changes
    assert bool(changed_links(links(1e10 / factor), links(1e10))) == changes
