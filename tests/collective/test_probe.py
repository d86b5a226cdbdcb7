"""Probing over real gloo, with links that are made slow by sleeping before a message goes."""

import fcntl
import itertools
import time

import numpy as np
import pytest
import torch

from ray_ep.collective import SoloGroup
from ray_ep.collective.probe import Messages, measure
from ray_ep.errors import GroupError, PlacementError
from ray_ep.placement.links.groups import contradictions


class Slowed(Messages):
    """A link of latency [R, R] and bandwidth [R, R]: the message leaves when it would have arrived."""

    def __init__(self, group, latency, bandwidth):
        super().__init__(group)
        self.rank, self.latency, self.bandwidth = group.rank, latency, bandwidth

    def send(self, tensor, to):
        time.sleep(self.latency[self.rank, to] + tensor.nbytes / self.bandwidth[self.rank, to])
        super().send(tensor, to)


class SharedCards(Messages):
    """One network card a node, of 5 MB/s: of its ranks one sends to another node at a time."""

    def __init__(self, group, node_of, folder):
        super().__init__(group)
        self.mine, self.node_of, self.folder = node_of[group.rank], node_of, folder

    def send(self, tensor, to):
        if self.mine != self.node_of[to]:
            with open(self.folder / str(self.mine), "w") as card:
                fcntl.flock(card, fcntl.LOCK_EX)
                time.sleep(tensor.nbytes / 5e6)
        super().send(tensor, to)


def shaped(node_of, inside, across):
    same = np.equal.outer(node_of, node_of)
    return [np.where(same, i, a) for i, a in zip(inside, across, strict=True)]


def wrong(topology, latency, bandwidth):
    """Links whose measured values are more than 20% off; the way back is not told from the way there."""
    off = ~np.eye(topology.num_ranks, dtype=bool)
    said, true = topology.latency, (latency + latency.T) / 2
    bad = (abs(said / true - 1) > 0.2) | (abs(topology.bandwidth / bandwidth - 1) > 0.2)
    return {(a, b): (said[a, b], topology.bandwidth[a, b]) for a, b in np.argwhere(bad & off).tolist()}


def probed(ranks, node_of, latency, bandwidth):
    """The topologies of all ranks, from the first of up to six tries after which each link was right once.

    A starved machine adds delays of its own, to some link or other in every try.
    """
    bad: dict = {}
    for i in range(6):
        found = ranks(len(node_of), lambda g: measure(g, node_of, messages=Slowed(g, latency, bandwidth)))
        now = wrong(found[0], latency, bandwidth)
        bad = {link: said for link, said in now.items() if i == 0 or link in bad}
        if not bad:
            break
    assert not bad
    return found


def test_the_topology_is_what_the_links_are_and_the_same_on_every_rank(ranks):
    node_of = [0, 0, 1, 1]
    latency, bandwidth = shaped(node_of, (4e-3, 8e7), (8e-3, 1e7))
    found = probed(ranks, node_of, latency, bandwidth)
    assert len({t.to_json() for t in found}) == 1
    off = ~np.eye(4, dtype=bool)
    assert found[0].measured[off].all()
    assert found[0].groups.tolist() == node_of
    assert contradictions(found[0]) == []
    assert found[0].lanes is None
    assert (found[0].spread[off] > 0).all()
    assert time.time() - 600 < found[0].measured_at <= time.time()


def test_ranks_that_share_a_network_card_are_found_by_sending_at_once(ranks, tmp_path):
    node_of = [0, 0, 1, 1]
    for _ in range(6):  # on a starved machine one rank may be done before its mate begins
        found = ranks(4, lambda g: measure(g, node_of, 3.0, messages=SharedCards(g, node_of, tmp_path)))
        if found[0].lanes is not None:
            break
    assert len({t.to_json() for t in found}) == 1
    assert (found[0].lanes < 1.5).all()  # 2 would be cards of their own


def test_each_direction_of_a_link_has_its_own_bandwidth_and_slow_pairs_do_not_slow_the_others_of_their_round(ranks):
    latency = np.full((4, 4), 4e-3)
    bandwidth = np.full((4, 4), 3e7)
    bandwidth[0, 1], bandwidth[2, 3], bandwidth[3, 2], bandwidth[1, 2] = 4e6, 1.5e7, 8e6, 1.5e7
    probed(ranks, [0, 1, 2, 3], latency, bandwidth)


@pytest.mark.slow
def test_two_ranks_that_are_said_to_share_a_node_but_do_not_are_found(ranks):
    latency, bandwidth = shaped([0, 0, 1], (4e-3, 2e8), (1.5e-2, 5e6))
    found = ranks(3, lambda g: measure(g, [0, 0, 0], messages=Slowed(g, latency, bandwidth)))
    assert found[0].groups.tolist() == [0, 0, 1]
    assert len(words := contradictions(found[0])) == 1
    assert words[0].startswith("rank 2 is said to share node 0 with ranks 0 and 1 but its best link there has")


def test_real_links_as_they_are(ranks):
    found = ranks(3, lambda g: measure(g, [0, 0, 1], budget_s=1.0))
    off = ~np.eye(3, dtype=bool)
    assert (found[0].bandwidth[off] > 1e6).all()
    assert (found[0].latency[off] < 0.5).all()
    assert measure(SoloGroup(), [0]).num_ranks == 1


def test_the_group_works_on_after_probing(ranks):
    def work(g):
        measure(g, [0, 1], budget_s=0.2)
        x = torch.ones(1)
        g.all_reduce(x)
        return x.item()

    assert ranks(2, work) == [2.0, 2.0]


@pytest.mark.parametrize("dies_at", [0, 5, 40])
def test_a_rank_that_dies_while_probing_is_an_error_on_the_others_that_says_so(ranks, dies_at):
    class Dying(Messages):
        sent = 0

        def send(self, tensor, to):
            if self._group.rank == 1 and self.sent == dies_at:
                self._group.close()  # its connections go, as when a process is killed
                raise InterruptedError
            self.sent += 1
            super().send(tensor, to)

    def work(g):
        try:
            measure(g, [0, 0, 1], messages=Dying(g, patience_s=5.0))
        except InterruptedError:
            return "dead"
        except GroupError as e:
            g.close()
            return str(e)

    found = ranks(3, work)
    assert found[1] == "dead"
    for rank in (0, 2):
        assert f"rank {rank}: probing the links failed (round " in found[rank]


def test_a_partner_that_says_nothing_ends_probing_after_its_patience(ranks):
    class Mute(Messages):
        def send(self, tensor, to):
            if self._group.rank == 0:
                time.sleep(1.5)
                raise InterruptedError
            super().send(tensor, to)

    def work(g):
        try:
            measure(g, [0, 1], messages=Mute(g, patience_s=0.5))
        except InterruptedError:
            return "mute"
        except GroupError as e:
            return str(e)

    assert "probing the links failed (round 1 of 1, link with rank 0)" in ranks(2, work)[1]


@pytest.mark.parametrize(
    ("node_of", "more", "says"),
    [
        ([0], {}, "names 1 ranks, the group has 2"),
        ([0, 1], {"budget_s": float("nan")}, "budget_s is nan"),
        ([0, 1], {"budget_s": -1.0}, "budget_s is -1"),
        ([0.5, 1.5], {}, "one integer a rank"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(ranks, node_of, more, says):
    with pytest.raises(PlacementError, match=says):
        ranks(2, lambda g: measure(g, node_of, **more))


@pytest.mark.parametrize("tick", [float("nan"), -1.0])
def test_a_clock_that_runs_wrong_on_one_rank_is_an_error_on_every_rank(ranks, tick):
    """The rank still follows the protocol, so nobody hangs, and all ranks see the same."""

    def work(g):
        ticks = itertools.count(0.0, tick)
        wrong = {"clock": lambda: next(ticks)} if g.rank == 1 else {}
        with pytest.raises(PlacementError, match="link from rank 1"):
            measure(g, [0, 1], budget_s=0.2, **wrong)

    ranks(2, work)
