"""A process beside a Ray cluster: says who is there, and does what has to be done near it. `grounds.py` starts it.

Its argument says what cluster: {"nodes": 2, "cpus": 1.0}, one of its own, raylets and a head without CPUs; {"address":
"HOST:PORT"}, one whose processes are all on this machine; {"join": "HOST:PORT"}, any other: there tasks send signals.
A request is a line {"id": N, "do": NAME, ...} on stdin, its answer a line {"id": N, "ok": VALUE} or {"id": N, "error":
WORDS} on stdout; that it is up is answer 0. At the end of stdin the run that it was last asked about is killed, and
what was started here is gone. Imports Ray.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private.state import GlobalState, state
from ray._raylet import GcsClient, GcsClientOptions  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_TASK_S = 30.0
"""How long a task that sends a signal may take: a worker may have to be started for it."""


class Hosts(Protocol):
    """A cluster, and ways to its processes.

    Attributes:
        gcs: its address. tables: what its GCS knows.
    """

    gcs: str
    tables: Any  # of Ray's GlobalState, which has no types

    def send(self, node: str, pid: int, number: int) -> None:
        """Send a signal to a process of a node."""

    def raylet(self, node: str) -> int:
        """The process of a node's raylet."""

    def add_node(self) -> str:
        """A node more; its id."""

    def close(self) -> None:
        """The end of what was started here."""


class OwnRaylets:
    """A cluster that lives as long as this process: raylets on one machine, the head's without CPUs."""

    def __init__(self, nodes: int, cpus: float):
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"kill_worker_timeout_milliseconds": 500}}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.gcs, self.tables = str(self._cluster.address), self._cluster.global_state
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> str:
        """One raylet more; its node."""
        node: str = self._cluster.add_node(num_cpus=self._cpus).node_id
        return node

    def send(self, node: str, pid: int, number: int) -> None:
        """All processes are here."""
        os.kill(pid, number)

    def raylet(self, node: str) -> int:
        """Ray's own handle of a node knows it."""
        found = next(n for n in self._cluster.worker_nodes if n.node_id == node)
        pid: int = found.all_processes["raylet"][0].process.pid
        return pid

    def close(self) -> None:
        """All of it is gone."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


class OnThisMachine:
    """A cluster whose hosts are all on this machine, each with an address of its own."""

    def __init__(self, address: str):
        self.gcs = address
        self.tables: Any = GlobalState()  # type: ignore[no-untyped-call]
        self.tables._initialize_global_state(
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )

    def send(self, node: str, pid: int, number: int) -> None:
        """All processes are here."""
        os.kill(pid, number)

    def raylet(self, node: str) -> int:
        """Found by the address in its command line."""
        address = next(n["NodeManagerAddress"] for n in self.tables.node_table() if n["NodeID"] == node)
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"/raylet") and f"--node_ip_address={address}".encode() in words:
                    return int(entry.name)
        raise LookupError(f"no raylet of {address} on this machine")

    def add_node(self) -> str:
        """Hosts are another program's to start."""
        raise LookupError("nodes are not started from here")

    def close(self) -> None:
        """Nothing was started here."""


class Joined:
    """Somebody's cluster: a task on a node sends a signal there."""

    def __init__(self, address: str):
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        self.gcs, self.tables = ray.get_runtime_context().gcs_address, state

    def send(self, node: str, pid: int, number: int) -> None:
        """By a task on the node, which takes no CPU of it."""
        there = NodeAffinitySchedulingStrategy(node, soft=False)

        def send(pid: int, number: int) -> None:  # in here, so that it goes there by value
            os.kill(pid, number)

        task = ray.remote(num_cpus=0, max_retries=0)(send)
        ray.get(task.options(scheduling_strategy=there).remote(pid, number), timeout=_TASK_S)

    def raylet(self, node: str) -> int:
        """Nobody asks: what is somebody's is not killed."""
        raise LookupError("nodes of a cluster that was joined are left alone")

    def add_node(self) -> str:
        """Nodes are somebody's."""
        raise LookupError("nodes of a cluster that was joined are left alone")

    def close(self) -> None:
        """The cluster is left."""
        ray.shutdown()


class Agent:
    """Answers requests; each public method is one."""

    def __init__(self, its: Hosts):
        self._its = its
        self.session = 0  # of the run that was last asked about

    def where(self) -> str:
        """Address of the cluster."""
        return str(self._its.gcs)

    def nodes(self) -> list[dict[str, Any]]:
        """{node, address, cpus, head} of the living ones."""
        return [
            {
                "node": n["NodeID"],
                "address": n["NodeManagerAddress"],
                "cpus": n["Resources"].get("CPU", 0.0),
                "head": "node:__internal_head__" in n["Resources"],
            }
            for n in self._its.tables.node_table()
            if n["Alive"]
        ]

    def ranks(self, session: int) -> list[dict[str, Any]]:
        """{name, pid, node} of the living ranks of the run whose driver is in this session of processes, by name."""
        self.session = session
        running = [j for j in self._its.tables.job_table() if not j["IsDead"]]
        jobs = {j["JobID"] for j in running if _session(j["DriverPid"]) == session}
        actors = self._its.tables.actor_table(None, actor_state_name="ALIVE").values()
        mine = [a for a in actors if a["ActorClassName"] == "RankActor" and a["JobID"] in jobs]
        found = [{"name": a["Name"], "pid": a["Pid"], "node": a["Address"]["NodeID"]} for a in mine]
        return sorted(found, key=lambda rank: (len(rank["name"]), rank["name"]))

    def send(self, node: str, pid: int, number: int) -> None:
        """A signal to a process of a node; that it has gone is no error."""
        with suppress(ProcessLookupError):
            self._its.send(node, pid, number)

    def end_node(self, node: str, number: int) -> None:
        """A signal to a node's raylet, if it is there."""
        with suppress(ProcessLookupError):
            os.kill(self._its.raylet(node), number)

    def add_node(self) -> str:
        """A node more, of a cluster that was started here."""
        return str(self._its.add_node())

    def drain(self, node: str, seconds: float) -> None:
        """Tell Ray that a node will be preempted in so many seconds."""
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int(1000 * (time.time() + seconds))
        accepted, why = GcsClient(address=self._its.gcs).drain_node(node, reason, "ray-ep chaos", deadline)
        if not accepted:
            raise RuntimeError(f"Ray refuses the drain: {why}")

    def close(self) -> None:
        """The end: of the run, if it is still there, and of what was started here."""
        if self.session:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.session, signal.SIGKILL)
        self._its.close()


def _session(pid: int) -> int:
    """The session of a process of this machine; -1: it is not here."""
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _hosts(told: dict[str, Any]) -> Hosts:
    if "nodes" in told:
        return OwnRaylets(told["nodes"], told["cpus"])
    return Joined(told["join"]) if "join" in told else OnThisMachine(told["address"])


def main() -> None:
    """Serve until the end of stdin."""
    told = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its end is that of stdin
    try:
        its = _hosts(told)
    except Exception as e:  # whatever it is: the asker tells it
        answers.write(json.dumps({"id": 0, "error": f"{type(e).__name__}: {e}"}) + "\n")
        return
    agent = Agent(its)
    try:
        answers.write(json.dumps({"id": 0, "ok": agent.where()}) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            number = request.pop("id")
            try:
                said = {"ok": getattr(agent, request.pop("do"))(**request)}
            except Exception as e:  # whatever it is: the asker decides
                said = {"error": f"{type(e).__name__}: {e}"}
            answers.write(json.dumps({"id": number, **said}) + "\n")
    finally:
        agent.close()


if __name__ == "__main__":
    main()
