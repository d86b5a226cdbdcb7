"""A rank actor without torch, in a process of its own: it starts in half a second. A collective waits for abort."""

import os
import threading
import time
from pathlib import Path

import ray

from ray_ep.errors import GroupError, LateError, ModelError, PlacementError
from ray_ep.rank import stacks


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2})
class LightRank:
    """What `Ranks` asks of every rank, and ways to fail."""

    def __init__(self, rank, size, threads, device):
        self.rank, self.aborted, self.aborts, self.calls = rank, threading.Event(), 0, 0
        if threads == 2 and rank == 1:  # a start that somebody stops
            time.sleep(600)

    @ray.method(concurrency_group="control")
    def ping(self):
        """Answer."""

    @ray.method(concurrency_group="control")
    def where(self):
        """As the real one."""
        context = ray.get_runtime_context()
        return {"rank": self.rank, "node": context.get_node_id(), "host": "beta", "pid": os.getpid(), "oom_kills": 0,
                "worker": context.get_worker_id()}  # fmt: skip

    @ray.method(concurrency_group="control")
    def oom_kills(self):
        """None."""
        return 0

    @ray.method(concurrency_group="control")
    def stacks(self):
        """As the real one, without a group."""
        return stacks.own()

    @ray.method(concurrency_group="control")
    def seen(self, pids):
        """As the real one."""
        return stacks.seen(pids)

    @ray.method(concurrency_group="control")
    def abort(self, epoch=None):
        """Release a collective."""
        self.aborts += 1
        self.aborted.set()

    @ray.method(concurrency_group="control")
    def aborts_seen(self):
        """How often it was aborted."""
        return self.aborts

    @ray.method(concurrency_group="control")
    def begun(self):
        """How many steps and saves it has begun."""
        return self.calls

    def prepare(self, problem):
        """Build a model, or not."""
        if problem:
            raise ModelError(problem)

    def train_step(self, step):
        """Collective: wait for the others, who never come; rank number `step` raises at once."""
        self.calls += 1
        if self.rank == step:
            raise ValueError("boom")
        self.aborted.wait()
        raise GroupError("aborted")

    def load(self, url, step):
        """Rank 0 notices that rank number `step` is late; that one computes for ever, and answers pings.

        Nobody notices before all have begun, which they note in the directory `url`.
        """
        Path(url, f"begun-{self.rank}").touch()
        while len(list(Path(url).glob("begun-*"))) < 3:
            time.sleep(0.01)
        if self.rank == step:
            time.sleep(600)
        if self.rank:
            self.aborted.wait()
        raise LateError("no answer from the peers")

    def save(self, url, step):
        """Not collective: rank number `step` takes long over it."""
        self.calls += 1
        if self.rank == step:
            time.sleep(600)
        return {"rank": self.rank}

    def migrate(self, placement, buffer_mb):
        """Every rank finds the same wrong, one of them late."""
        time.sleep(0.3 * self.rank)
        raise PlacementError("does not fit")
