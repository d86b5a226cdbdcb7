"""The Ray actor of a rank that trains: holds a `ModelRank` and a `Trainer`, passes calls on. Decides nothing."""

from __future__ import annotations

import logging
import socket
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedConfig

from ray_ep.config import from_dict
from ray_ep.errors import RayEPError, SaveError
from ray_ep.moe import Choice, Moved
from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous
from ray_ep.placement.links.groups import groups_of
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.handover import hand_over
from ray_ep.rank.joining import JoiningRank
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.results import RankState, StepResult
from ray_ep.rank.saved.disk import in_one_line
from ray_ep.rank.snapshot.copies import COUNTED
from ray_ep.rank.snapshot.on_disk import Shelf
from ray_ep.rank.snapshot.restore import Rewind, restore
from ray_ep.rank.snapshot.snapshots import Held, Snapshots
from ray_ep.rank.trainer import Trainer

log = logging.getLogger("ray_ep.rank")


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2})  # type: ignore[call-overload]
class RankActor(JoiningRank):
    """One rank of a training run."""

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
        self.model = ModelRank(from_dict(cfg), config, self.group, placement, *where)
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
