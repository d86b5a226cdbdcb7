"""Which nodes drain, and whether a loss was planned: a Ray's head that answers as the test says, and a real one."""

import os
import signal
import threading
import time

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ray_ep.driver.elastic.leaving import Leaving, why

DEAD = {"NodeID": "a", "Alive": False, "DeathReasonMessage": "no heartbeat\nfor long"}


@pytest.mark.parametrize(
    ("reason", "drained", "words"),
    [
        (0, False, ""),
        (1, False, "its node was ended by the autoscaler or by SIGTERM (no heartbeat for long)"),
        (2, False, ""),
        (2, True, "its node was draining"),  # killed before its deadline
        (1, True, "its node was draining"),
        (3, False, "its node was preempted (no heartbeat for long)"),
        (3, True, "its node was preempted (no heartbeat for long)"),
        (4, False, "its node was idle, and the autoscaler ended it (no heartbeat for long)"),
    ],
)
def test_rays_reason_and_a_drain_before_it_tell_a_planned_end_from_a_failure(reason, drained, words):
    assert why("a", [{"NodeID": "b", "Alive": True}, DEAD | {"DeathReason": reason}], drained) == words


def test_a_rank_that_dies_on_a_node_which_lives_is_a_failure_unless_the_node_drains():
    alive = [{"NodeID": "a", "Alive": True, "DeathReason": 0}]
    assert why("a", alive, False) == ""
    assert why("a", alive, True) == "its node was draining"
    assert why("a", [], False) == ""


class Head:
    """Ray's head: it answers, raises or does not come back."""

    def __init__(self):
        self.drains, self.error, self.there, self.asked = {}, None, threading.Event(), 0
        self.there.set()

    def __call__(self):
        self.asked += 1
        self.there.wait(120)
        if self.error:
            raise self.error
        return dict(self.drains)


def leaving():
    head = Head()
    return Leaving(head, lambda: [DEAD | {"DeathReason": 2}]), head


def test_a_node_that_drained_is_remembered_when_ray_has_forgotten_it():
    it, head = leaving()
    assert it.draining() == {}
    assert it.planned("a") == ""
    head.drains = {"a": 5}
    assert it.draining() == {"a": 5}
    head.drains = {}
    assert it.draining() == {}
    assert it.planned("a") == "its node was draining"


def test_while_the_head_is_away_a_step_goes_on_with_what_was_known():
    it, head = leaving()
    head.drains = {"a": 5}
    assert it.draining() == {"a": 5}
    head.there.clear()
    assert [it.draining() for _ in range(100)] == [{"a": 5}] * 100
    assert head.asked == 2  # one short wait, not a hundred
    head.drains = {"a": 5, "b": 7}
    head.there.set()
    limit = time.monotonic() + 60
    while it.draining() != {"a": 5, "b": 7} and time.monotonic() < limit:
        time.sleep(0.01)
    assert it.draining() == {"a": 5, "b": 7}


def test_an_error_of_the_head_changes_nothing():
    it, head = leaving()
    head.drains = {"a": 5}
    it.draining()
    head.error = RuntimeError("the head is gone")
    assert it.draining() == {"a": 5}


def test_a_loss_is_a_failure_where_the_head_does_not_say_otherwise():
    def away():
        raise RuntimeError("the head is gone")

    assert Leaving(dict, away).planned("a") == ""


def ended(node):
    """Wait until Ray says that a node is dead."""
    limit = time.monotonic() + 120
    while any(n["Alive"] for n in ray.nodes() if n["NodeID"] == node.node_id):
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture
def nodes():
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"health_check_period_ms": 500}}
    it = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=it.address, log_to_driver=False, logging_level="ERROR")
    yield it
    ray.shutdown()
    it.shutdown()


@pytest.mark.slow
def test_on_a_real_cluster_drained_and_ended_nodes_are_told_from_one_that_was_killed(nodes):
    @ray.remote(num_cpus=1)
    class Busy:
        def ping(self):
            return ray.get_runtime_context().get_node_id()

    drained, stopped, killed = (nodes.add_node(num_cpus=1) for _ in range(3))
    actors = [Busy.remote() for _ in range(3)]
    assert set(ray.get([a.ping.remote() for a in actors])) == {n.node_id for n in (drained, stopped, killed)}
    it = Leaving()
    assert it.draining() == {}
    deadline = int(time.time() * 1000) + 60_000
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = GcsClient(address=nodes.address).drain_node(drained.node_id, preemption, "spot notice", deadline)
    assert accepted
    time.sleep(0.2)
    assert it.draining() == {drained.node_id: deadline}
    began = time.perf_counter()
    for _ in range(50):
        it.draining()
    assert (time.perf_counter() - began) / 50 < 0.005
    head = nodes.head_node.all_processes["gcs_server"][0].process.pid
    os.kill(head, signal.SIGSTOP)
    began = time.perf_counter()
    assert [it.draining() for _ in range(50)] == [{drained.node_id: deadline}] * 50
    assert time.perf_counter() - began < 0.5  # Ray's own call waits for the head, and lets other threads run
    os.kill(head, signal.SIGCONT)
    raylets = {n.node_id: n.all_processes["raylet"][0].process.pid for n in (drained, stopped, killed)}
    for node, number in ((drained, signal.SIGKILL), (stopped, signal.SIGTERM), (killed, signal.SIGKILL)):
        assert it.planned(node.node_id) == ("its node was draining" if node is drained else "")
        os.kill(raylets[node.node_id], number)
        ended(node)
    assert it.draining() == {}  # Ray has forgotten it
    assert it.planned(drained.node_id) == "its node was draining"
    assert it.planned(stopped.node_id).startswith(
        "its node was ended by the autoscaler or by SIGTERM (received SIGTERM"
    )
    assert it.planned(killed.node_id) == ""
