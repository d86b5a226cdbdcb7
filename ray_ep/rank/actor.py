"""The Ray actor of a rank: joins groups, holds a `Rank`, passes calls on. Nothing is decided here."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedConfig

from ray_ep.collective import Group, SoloGroup
from ray_ep.collective.probe import measure
from ray_ep.collective.ray_backend import join, leave
from ray_ep.config import from_dict
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.rank.data import Corpus
from ray_ep.rank.rank import Rank, StepResult


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})
class RankActor:
    """One rank of a run."""

    def __init__(self, rank: int, size: int, threads: int):
        torch.set_num_threads(threads)
        self.rank, self.size = rank, size
        self.name, self.group = "", None

    def __repr__(self) -> str:
        return f"Rank(rank={self.rank}, of={self.size})"

    @ray.method(concurrency_group="control")
    def where(self) -> dict[str, Any]:
        """Host, Ray node and process of this rank."""
        context = ray.get_runtime_context()
        return {"rank": self.rank, "node": context.get_node_id(), "host": socket.gethostname(), "pid": os.getpid()}

    def join(self, name: str, epoch: int, timeout_s: float) -> None:
        """Form the group of an epoch with the other ranks (collective)."""
        self.name = name
        self.group: Group | None = (
            SoloGroup(epoch) if self.size == 1 else join(name, self.rank, self.size, epoch, timeout_s)
        )

    def probe(self, node_of: np.ndarray, budget_s: float) -> Topology:
        """`measure` on the joined group (collective)."""
        assert self.group is not None
        return measure(self.group, node_of, budget_s)

    def build(
        self,
        cfg: dict[str, Any],
        config: PreTrainedConfig,
        corpus: Corpus,
        placement: Placement,
        node_of: np.ndarray,
    ) -> dict[str, int]:
        """Build the model on the joined group (collective); returns sizes for people."""
        assert self.group is not None
        self.work = Rank(from_dict(cfg), config, corpus, self.group, placement, node_of)
        return {"parameters": sum(p.numel() for p in self.work.model.parameters())}

    def train_step(self, step: int) -> StepResult:
        """`Rank.train_step`."""
        return self.work.train_step(step)

    def evaluate(self, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]]:
        """`Rank.evaluate`."""
        return self.work.evaluate(trace)

    def save(self, url: str, step: int) -> dict[str, list[Any]]:
        """`Rank.save`."""
        return self.work.save(url, step)

    def load(self, url: str, step: int) -> None:
        """`Rank.load`."""
        self.work.load(url, step)

    def statistics(self) -> RoutingStatistics:
        """`Rank.statistics`."""
        return self.work.statistics()

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Release this rank from a collective that waits for a dead peer."""
        if self.group is not None:
            self.group.abort()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            leave(self.name)
