"""The Ray actor of a rank: joins groups, holds a `ModelRank` and maybe a `Trainer`, passes calls on. Decides nothing.

Ranks on GPUs have not run yet.
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
from transformers import PreTrainedConfig

from ray_ep.collective import EpochGroup, Group, SoloGroup, StagedGroup
from ray_ep.collective.epoch_group import Maker
from ray_ep.collective.nvml import gpu_links, library
from ray_ep.collective.probe import measure, measure_links
from ray_ep.collective.ray_backend import RENDEZVOUS_S, join, usable
from ray_ep.config import from_dict
from ray_ep.errors import RayEPError, SaveError
from ray_ep.moe import Choice, Moved
from ray_ep.moe.exchange.elastic import installed
from ray_ep.moe.exchange.ways import DEEPEP
from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous
from ray_ep.placement.links.gpu_links import GpuLinks
from ray_ep.placement.links.groups import groups_of
from ray_ep.rank import stacks
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.handover import hand_over
from ray_ep.rank.memory import oom_kills
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.pretrained.reading import Read, Reading
from ray_ep.rank.reach import DirectoryTrial
from ray_ep.rank.results import RankState, StepResult
from ray_ep.rank.saved.disk import in_one_line
from ray_ep.rank.snapshot.copies import COUNTED
from ray_ep.rank.snapshot.on_disk import Shelf
from ray_ep.rank.snapshot.restore import Rewind, restore
from ray_ep.rank.snapshot.snapshots import Held, Snapshots
from ray_ep.rank.trainer import Trainer

log = logging.getLogger("ray_ep.rank")


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2})  # type: ignore[call-overload]
class RankActor:
    """One rank of a run."""

    def __init__(self, rank: int, size: int, threads: int, device: str = "cpu"):
        torch.set_num_threads(threads)
        # Ray shows a rank its own GPU alone, so that it is number 0 in every thread.
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.rank, self.size = rank, size
        self.group = EpochGroup()  # the one object that all keep, through all epochs
        self.side = EpochGroup()  # that of snapshots
        self.reading = Reading()
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
    def read(self) -> Read:
        """What this rank has read of a transformers checkpoint."""
        return self.reading.so_far()

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

    def build(
        self,
        cfg: dict[str, Any],
        config: PreTrainedConfig,
        corpus: Corpus | None,
        placement: Placement,
        topology: Topology,
    ) -> dict[str, int]:
        """Build the model on the joined group (collective); returns sizes for people.

        Args:
            corpus: to train on; None: this rank does not train, and has no method that needs a `Trainer`.
        """
        where = (groups_of(topology), self.device, topology)  # the groups that plans and predictions take for nodes
        self.model = ModelRank(from_dict(cfg), config, self.group, placement, *where, reading=self.reading)
        if corpus is not None:
            self._train(corpus)
        return {"parameters": sum(p.numel() for p in self.model.model.parameters())}

    def prepare(self, cfg: dict[str, Any], config: PreTrainedConfig, corpus: Corpus, layers: int, experts: int) -> None:
        """Build the model without experts and in no group, to come into one by `join` and `regroup` (not collective).

        Args:
            layers, experts: MoE layers of the model, and experts of each.
        """
        self.group.sit(1, 2)
        none = contiguous(layers, experts, 1).among((0, -1))
        self.model = ModelRank(from_dict(cfg), config, self.group, none, device=self.device)
        self._train(corpus)

    def _train(self, corpus: Corpus) -> None:
        self.trainer = Trainer(self.model, corpus)
        self.snapshots = Snapshots(self.model.model, self.model.ep, self.trainer.optimizer, self.side)

    def choose_exchange(self, step: int) -> Choice:
        """`Trainer.choose_exchange` among the groups that were joined; the others are left."""
        choice = self.trainer.choose_exchange(step, dict(self.group.transports))
        self.group.keep(choice.transport)
        return choice

    def train_step(self, step: int) -> StepResult | None:
        """`Trainer.train_step`."""
        return self.trainer.train_step(step)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Have an evaluation, or a step of several passes, broken off at its next pass."""
        self.trainer.stop.set()

    def evaluate(self, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]] | None:
        """`Trainer.evaluate`."""
        return self.trainer.evaluate(trace)

    def save(self, url: str, step: int) -> dict[str, list[Any]] | SaveError:
        """`Trainer.save`; an error that it meets is returned, so that the driver hears all ranks and none writes on.

        A snapshot that is still written to disk comes first: then it is older than this, and not in its way.
        """
        self.snapshots.wait()
        try:
            written = self.trainer.save(url, step)
            log.info("saved step=%d", step)
            return written
        except SaveError as e:
            return e
        except RayEPError:
            raise
        except Exception as e:  # each file system has errors of its own
            return SaveError(f"rank {self.rank} on {socket.gethostname()}: {in_one_line(e)}")

    def load(self, url: str, step: int) -> None:
        """`Trainer.load`."""
        self.trainer.load(url, step)

    def statistics(self) -> RoutingStatistics:
        """`ModelRank.statistics`."""
        return self.model.statistics()

    def sample(self) -> np.ndarray:
        """`ModelRank.sample`."""
        return self.model.sample()

    def migrate(self, placement: Placement, buffer_mb: float) -> Moved:
        """`Trainer.migrate`."""
        moved = self.trainer.migrate(placement, buffer_mb)
        log.info("moved placement=%d received=%d bytes seconds=%.3f", placement.version, moved.received, moved.seconds)
        return moved

    def snapshot(self, step: int, node_of: list[int], shelf: Shelf | None = None) -> str:
        """`Snapshots.take`."""
        return self.snapshots.take(step, node_of, shelf)

    def end_snapshot(self) -> None:
        """Until nothing of a snapshot is under way: the group that carries it is about to be left."""
        self.snapshots.regroup()

    def state(self) -> tuple[RankState, Held]:
        """Where this rank is, and which snapshots it could give. After a call that failed, too."""
        self.snapshots.regroup()
        return self.trainer.state(), self.snapshots.held()

    def settle(self, finish: int | None) -> None:
        """Finish step `finish` where all of it is reduced; a half step of another kind is forgotten."""
        if finish is not None and self.trainer.state().ready == finish:
            self.trainer.finish(finish)
        self.trainer.discard()

    def publish(self) -> None:
        """`Trainer.publish`."""
        self.trainer.publish()

    def regroup(self, placement: Placement, topology: Topology, fresh: tuple[int, ...] = ()) -> None:
        """On over the group that was joined, with what this rank has; ranks `fresh` are given what every rank has."""
        if fresh:
            hand_over(self.trainer, fresh)
        self.trainer.regroup(placement, topology)

    def restore(self, to: Rewind) -> None:
        """`ray_ep.rank.snapshot.restore`."""
        restore(self.trainer, None if self.rank in to.fresh else self.snapshots.get(to.key), to)

    def counted(self, leaves: bool) -> dict[str, torch.Tensor]:
        """Sums of the routing statistics of this rank, if it leaves."""
        return {name: getattr(self.model.ep.counters, name).cpu() for name in COUNTED} if leaves else {}

    def count(self, sums: list[dict[str, torch.Tensor]]) -> None:
        """Take on the sums of ranks that go."""
        for name, then in ((name, then) for given in sums for name, then in given.items()):
            getattr(self.model.ep.counters, name).add_(then.to(self.device))

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
