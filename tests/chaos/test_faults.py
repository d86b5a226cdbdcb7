"""Whom a fault hits, what follows it later, and what is not done: on a cluster and a clock that are made up."""

import signal

import pytest

from ray_ep.chaos.faults import DRAIN_S, NEW_NODE_S, SLOW_PART, Faults, NotNow
from ray_ep.chaos.schedule import Fault, Kind

SILENCE_S = 5.0


class FakeCluster:
    """A ground and its agent: nodes with ranks, and a list of what was done."""

    impossible = {}
    in_place = False

    def __init__(self, ranks_of):
        self.agent = self
        self.ranks_of = dict(ranks_of)  # node -> how many ranks
        self.done = []

    def ask(self, do, **told):
        if do == "nodes":
            head = {"node": "head", "address": "a-head", "cpus": 0.0, "head": True}
            return [head, *({"node": n, "address": f"a-{n}", "cpus": 1.0, "head": False} for n in self.ranks_of)]
        if do == "ranks":
            assert told == {"session": 77}
            places = [(node, i) for node, count in self.ranks_of.items() for i in range(count)]
            return [{"name": f"ep/x/rank{k}", "pid": 100 + k, "node": node} for k, (node, _) in enumerate(places)]
        self.done.append((do, *told.values()))
        return None

    def new_node(self, address):
        self.done.append(("new_node", address))

    def cut(self, address):
        self.done.append(("cut", address))

    def heal(self, address):
        self.done.append(("heal", address))

    def slow(self, address, part):
        self.done.append(("slow", address, part))


class Scene:
    def __init__(self, least=1, **ranks_of):
        self.cluster, self.now = FakeCluster(ranks_of), 0.0
        self.faults = Faults(self.cluster, 77, SILENCE_S, least, 15.0, lambda: self.now)

    def hit(self, kind, pick=0.0, strength=0.0):
        return self.faults.inject(Fault(0, kind, 0.0, pick, strength))

    def after(self, seconds):
        """What was done from now on within so many seconds."""
        self.cluster.done.clear()
        self.now += seconds
        self.faults.tend()
        return list(self.cluster.done)


@pytest.mark.parametrize(("pick", "pid"), [(0.0, 100), (0.34, 101), (0.99, 102)])
def test_a_kill_hits_the_rank_that_was_drawn(pick, pid):
    scene = Scene(a=2, b=1)
    words, members = scene.hit(Kind.KILL, pick)
    assert scene.cluster.done == [("send", "b" if pid == 102 else "a", pid, signal.SIGKILL)]
    assert f"process {pid}" in words
    assert members == (f"rank-{pid - 100}",)


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.STOP])
def test_the_ranks_that_a_run_needs_are_spared(kind):
    scene = Scene(least=2, a=1, b=1)
    with pytest.raises(NotNow, match="2 ranks left"):
        scene.hit(kind)
    assert scene.cluster.done == []


@pytest.mark.parametrize(("strength", "seconds"), [(0.2, 0.5 * SILENCE_S), (0.8, 2 * SILENCE_S)])
def test_a_stopped_rank_is_woken_up_later(strength, seconds):
    scene = Scene(a=1, b=1)
    scene.hit(Kind.STOP, 0.0, strength)
    assert scene.cluster.done == [("send", "a", 100, signal.SIGSTOP)]
    assert scene.after(seconds - 0.1) == []
    assert scene.after(0.2) == [("send", "a", 100, signal.SIGCONT)]
    assert scene.after(100) == []


def test_a_killed_node_is_one_with_ranks_and_a_new_one_takes_its_place():
    scene = Scene(empty=0, a=1, b=1)
    assert scene.hit(Kind.NODE, 0.99)[1] == ("rank-1",)
    assert scene.cluster.done == [("end_node", "b", signal.SIGKILL)]
    assert scene.after(NEW_NODE_S - 0.1) == []  # Ray still counts the dead one
    assert scene.after(0.2) == [("new_node", "a-b")]


def test_a_node_without_which_too_few_ranks_are_left_is_spared():
    scene = Scene(least=2, a=3, b=1)
    for pick in (0.0, 0.99):
        assert "node b" in scene.hit(Kind.NODE, pick)[0]
    with pytest.raises(NotNow, match="no node can be spared"):
        Scene(a=4, empty=0).hit(Kind.NODE)


def test_an_added_node_makes_up_for_the_next_lost_one():
    scene = Scene(a=1, b=1)
    scene.hit(Kind.ADD)
    assert scene.cluster.done == [("new_node", "")]
    scene.cluster.ranks_of["c"] = 0
    with pytest.raises(NotNow, match="one node more already"):
        scene.hit(Kind.ADD)
    scene.hit(Kind.NODE)
    assert scene.after(NEW_NODE_S) == []


def test_a_drained_node_is_replaced_at_once_and_ended_at_its_deadline():
    scene = Scene(a=1, b=1)
    scene.hit(Kind.DRAIN)
    assert scene.cluster.done == [("drain", "a", DRAIN_S)]
    assert scene.after(NEW_NODE_S) == [("new_node", "a-a")]
    assert scene.after(DRAIN_S) == [("end_node", "a", signal.SIGTERM)]


def test_a_drained_node_that_has_gone_is_not_ended_again():
    scene = Scene(a=1, b=1)
    scene.hit(Kind.DRAIN)
    scene.after(NEW_NODE_S)
    del scene.cluster.ranks_of["a"]
    assert scene.after(DRAIN_S) == []


def test_where_a_new_node_needs_the_host_of_the_old_one_it_waits_for_that():
    scene = Scene(a=1, b=1)
    scene.cluster.in_place = True
    scene.hit(Kind.DRAIN)
    assert scene.after(DRAIN_S) == [("end_node", "a", signal.SIGTERM)]
    assert scene.after(NEW_NODE_S) == [("new_node", "a-a")]


def test_nodes_of_somebody_are_drained_but_not_ended():
    scene = Scene(a=1, b=1)
    scene.cluster.impossible = {Kind.NODE: "not ours"}
    scene.hit(Kind.DRAIN)
    assert ("end_node", "a", signal.SIGTERM) not in scene.after(DRAIN_S + NEW_NODE_S)


def test_a_cut_host_gets_its_cable_back_and_a_node_again():
    scene = Scene(a=1, b=1)
    scene.hit(Kind.CUT, 0.99)
    assert scene.cluster.done == [("cut", "a-b")]
    del scene.cluster.ranks_of["b"]  # Ray has given it up
    assert scene.after(3 * SILENCE_S) == [("heal", "a-b"), ("new_node", "a-b")]


def test_a_slowed_host_gets_its_links_back():
    scene = Scene(a=1, b=1)
    scene.hit(Kind.SLOW)
    assert scene.cluster.done == [("slow", "a-a", SLOW_PART)]
    assert scene.after(14.9) == []
    assert scene.after(0.2) == [("slow", "a-a", 1.0)]
