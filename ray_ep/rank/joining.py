"""What every rank actor does, whatever it computes: says where it is, joins groups, measures links, is released.

A base of actor classes; decides nothing. Ranks on GPUs have not run yet.
"""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from ray_ep.collective import EpochGroup, Group, SoloGroup, StagedGroup
from ray_ep.collective.epoch_group import Maker
from ray_ep.collective.nvml import gpu_links, library
from ray_ep.collective.probe import measure, measure_links
from ray_ep.collective.ray_backend import RENDEZVOUS_S, join, usable
from ray_ep.moe.exchange.elastic import installed
from ray_ep.moe.exchange.ways import DEEPEP
from ray_ep.placement import Topology
from ray_ep.placement.links.gpu_links import GpuLinks
from ray_ep.rank import stacks
from ray_ep.rank.memory import oom_kills
from ray_ep.rank.reach import DirectoryTrial

log = logging.getLogger("ray_ep.rank")


class JoiningRank:
    """One rank of a group. Actor classes derive from it, with a concurrency group `control` of 2."""

    def __init__(self, rank: int, size: int, threads: int, device: str = "cpu"):
        torch.set_num_threads(threads)
        # Ray shows a rank its own GPU alone, so that it is number 0 in every thread.
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.rank, self.size = rank, size
        self.group = EpochGroup()  # the one object that all keep, through all epochs
        self.side = EpochGroup()  # that of snapshots
        # On stderr, which the Actors view of Ray's dashboard shows first.
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
        log.setLevel(logging.INFO)

    def __repr__(self) -> str:
        return f"Rank(rank={self.rank}, of={self.size})"

    @ray.method(concurrency_group="control")
    def where(self) -> dict[str, Any]:
        """Host, Ray node and process of this rank, as its system and as Ray's table of workers name it."""
        context = ray.get_runtime_context()
        who = {"rank": self.rank, "node": context.get_node_id(), "host": socket.gethostname(), "pid": os.getpid()}
        given = context.get_accelerator_ids().get("GPU") or ["0"]
        device = "cpu" if self.device.type == "cpu" else f"cuda:{given[0]}"  # as the node numbers it
        return {**who, "device": device, "oom_kills": oom_kills(), "worker": context.get_worker_id()}

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answer: whoever asked knows that this process runs."""

    @ray.method(concurrency_group="control")
    def oom_kills(self) -> int:
        """`ray_ep.rank.memory.oom_kills` on this node."""
        return oom_kills()

    @ray.method(concurrency_group="control")
    def stacks(self) -> str:
        """What this process is at: `ray_ep.rank.stacks.own`, how far each rank's calls are, torch's flight recorder."""
        told = self.group.standing() or "not known\n"
        recorder = stacks.flight_recorder()
        return f"{stacks.own()}\nCalls of the group:\n{told}\nFlight recorder of torch:\n{recorder}"

    @ray.method(concurrency_group="control")
    def seen(self, pids: list[int]) -> list[str]:
        """`ray_ep.rank.stacks.seen`: other processes of this machine from outside."""
        return stacks.seen(pids)

    @ray.method(concurrency_group="control")
    def end(self) -> None:
        """End this process, whatever it is at: for whom Ray's head, which does that, is away."""
        os._exit(0)

    def reach(self, trial: DirectoryTrial, rank: int | None = None) -> list[str]:
        """What this node cannot read or write of what the run needs there, in words; tried as `rank`, if given."""
        return trial.on_rank(self.rank if rank is None else rank)

    def transports(self) -> list[str]:
        """Transports that this process could use, by their names in the configuration."""
        found = usable()
        return [*found, DEEPEP] if "torch_nccl" in found and installed() else found

    def join(
        self,
        name: str,
        epoch: int,
        timeout_s: float,
        transports: list[str],
        limit_s: float = RENDEZVOUS_S,
        seat: tuple[int, int] | None = None,
        snapshots: bool = False,
    ) -> None:
        """Leave the group of before, and form that of an epoch (collective), once over each of the transports.

        `abort` ends it. The first transport is in use, until `choose_exchange` takes another.

        Args:
            timeout_s: of a collective. limit_s: for the peers to come, over each transport.
            seat: rank and size in this epoch; None: as this rank was made.
            snapshots: form a second group, in which they travel.

        Raises:
            BadInput: a transport cannot be used in this process.
            GroupError: a peer did not come in time or died, or the forming was aborted.
        """
        self.rank, self.size = seat or (self.rank, self.size)

        def over(transport: str) -> Group:
            group = join(f"{name}-{epoch}-{transport}", self.rank, self.size, epoch, timeout_s, transport, limit_s)
            on_device = transport != "gloo" or self.device.type == "cpu"
            return group if on_device else StagedGroup(group)

        alone: dict[str, Maker] = {"memory": lambda: SoloGroup(epoch)}
        self.group.form(epoch, alone if self.size == 1 else {t: partial(over, t) for t in transports}, limit_s)
        if snapshots:
            what = f"{name}-{epoch}-snapshots", self.rank, self.size, epoch, timeout_s, "gloo", limit_s
            self.side.form(epoch, alone if self.size == 1 else {"gloo": partial(join, *what)}, limit_s)
        log.info("joined epoch=%d rank=%d of=%d transports=%s", epoch, self.rank, self.size, ",".join(transports))

    def probe(self, node_of: np.ndarray, budget_s: float) -> Topology:
        """`measure` on the joined group, the first of its transports (collective)."""
        return measure(self.group.present, node_of, budget_s, str(self.device))

    def probe_links(self, known: Topology, pairs: list[tuple[int, int]], budget_s: float) -> Topology:
        """`measure_links` on the same group (collective)."""
        return measure_links(self.group.present, known, pairs, budget_s, str(self.device))

    def gpu_links(self) -> GpuLinks | None:
        """What the driver of this rank's GPU says of its links; None without one."""
        return gpu_links(self.device, library())

    @ray.method(concurrency_group="control")
    def abort(self, epoch: int | None = None) -> None:
        """Release this rank from a collective that waits for a dead peer, or from `join`; only in this epoch, if given.

        Safe while it is in another call.
        """
        self.group.abort(epoch)
        self.side.abort(epoch)

    def close(self) -> None:
        """Leave the group; over in about a second, whatever the peers do."""
        self.group.close()
        self.side.close()
