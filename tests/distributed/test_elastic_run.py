"""Ranks come and go in a run on real raylets: asked for, drained away, replaced; its curve is the undisturbed one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

STEADY = ["optim.schedule=constant_with_warmup", "snapshot.every=3", "eval.every=0"]


@pytest.fixture(scope="module")
def undisturbed(shared, lines, cluster):
    command = shared.train(*STEADY, "optim.steps=120", "run_dir=undisturbed", RAY_ADDRESS=cluster.driver)
    assert command.wait(200) == 0, command.err
    return lines(shared.path / "undisturbed" / "metrics.jsonl")


@pytest.fixture
def nodes():
    """A head with room for the first two ranks, and a node with room for one more."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.other = made.add_node(num_cpus=1)
    yield made
    made.shutdown()


class Running:
    """A run that goes on until the test stops it."""

    def __init__(self, here, lines, nodes, faults, *options):
        self.lines, self.path, self.here = lines, here.path / "run", here
        at = {"RAY_ADDRESS": nodes.address}
        faults.slow(0.2)  # as other models are: a rank comes within some steps, not within hundreds
        self.command = here.train(
            *STEADY, "optim.steps=100000", "run_dir=run", "cluster.cpus_per_rank=1", *options, faults=faults, **at
        )
        self.metrics = self.path / "metrics.jsonl"

    def events(self, kind):
        return [e for e in self.lines(self.path / "events.jsonl") if e["kind"] == kind]

    def until_size(self, size, since=0):
        """Wait for two steps on so many ranks, after step `since`."""
        told = lambda: [m["world_size"] for m in self.lines(self.metrics) if m["step"] > since][-2:]  # noqa: E731
        self.command.until(lambda: told() == [size] * 2, 200, f"{size} ranks")

    def ask(self, *arguments):
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray-ep"), *arguments],
            cwd=self.here.path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def stop(self):
        os.kill(self.command.process.pid, signal.SIGINT)
        assert self.command.wait(200) == 130, self.command.err
        assert self.command.left() == {}


def drain(address, node):
    """As a spot notice does it."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(node, reason, "spot notice", 0)
    assert accepted, why


def follows(got, want):
    """Loss, norm and tokens of each step are those of the undisturbed run; a near-tie of a router shows in the norm."""
    curve, expected = ({m["step"]: m for m in told} for told in (got, want))
    assert len(curve) > 20
    for step in curve.keys() & expected.keys():
        a, b = curve[step], expected[step]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), f"loss of step {step}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), f"norm of step {step}"
        assert (a["tokens"], a["lr"]) == (b["tokens"], b["lr"])


@pytest.mark.slow
def test_a_run_grows_when_asked_leaves_a_node_that_drains_and_replaces_a_killed_rank(
    here, lines, nodes, faults, undisturbed
):
    it = Running(here, lines, nodes, faults, "cluster.ranks=2", "elastic.max_ranks=3")
    it.until_size(2)
    it.ask("scale", "run", "3")
    it.until_size(3)
    (came,) = [e["fields"] for e in it.events("elastic") if e["fields"].get("come")]
    assert came["come"] == ["rank-2"]
    assert set(came["seconds"]) == {"hand_over", "regroup", "give", "move"}

    drain(nodes.address, nodes.other.node_id)
    nodes.add_node(num_cpus=1)
    it.command.until(lambda: any(e["fields"].get("left") for e in it.events("elastic")), 200, "the leave")
    left = next(e["fields"] for e in it.events("elastic") if e["fields"].get("left"))
    assert (left["planned_leaves"], left["failures"]) == (1, 0)
    it.until_size(3, since=lines(it.metrics)[-1]["step"])
    assert [m["step"] for m in lines(it.metrics)] == list(range(1, len(lines(it.metrics)) + 1)), "nothing is repeated"

    os.kill(faults.pid(0), signal.SIGKILL)
    it.command.until(lambda: it.events("recovered"), 200, "the recovery")
    it.until_size(3, since=lines(it.metrics)[-1]["step"])
    it.stop()
    (recovered,) = it.events("recovered")
    assert (recovered["fields"]["planned"], recovered["fields"]["failures"]) == (False, 1)
    assert recovered["fields"]["repeated"] <= 4
    follows(lines(it.metrics), undisturbed)


@pytest.mark.slow
def test_a_run_takes_what_is_free_and_has_a_slow_rank_replaced_on_another_node(here, lines, nodes, faults, undisturbed):
    faults.slow(0.3, at="ray_ep.rank.step.forward:Forward.loss", call=30, rank=0)
    options = ["elastic.policy=available", "elastic.evict_stragglers=true"]
    it = Running(here, lines, nodes, faults, "cluster.ranks=2", "elastic.max_ranks=3", *options)
    it.until_size(3)
    it.command.until(lambda: it.events("straggler"), 200, "the slow rank")
    nodes.add_node(num_cpus=1)
    it.command.until(lambda: any(e["fields"].get("left") for e in it.events("elastic")), 200, "another in its place")
    it.until_size(3, since=lines(it.metrics)[-1]["step"])
    it.stop()
    slow = it.events("straggler")[0]["fields"]
    assert (slow["member"], slow["times"] > 3) == ("rank-0", True)
    left = next(e["fields"] for e in it.events("elastic") if e["fields"].get("left"))
    assert (left["left"], left["come"], left["planned_leaves"]) == (["rank-0"], ["rank-3"], 1)
    assert not it.events("recovered")
    follows(lines(it.metrics), undisturbed)
