"""The Ray actor of a rank that generates: holds a `Generator`, passes calls on, and hands out what is new."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from transformers import PreTrainedConfig

from ray_ep.config import from_dict
from ray_ep.moe import Choice, Moved
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.links.groups import groups_of
from ray_ep.rank.generate.generator import Generator
from ray_ep.rank.generate.requests import Delta, Limits, RankStatus, Request
from ray_ep.rank.generate.score import Row, Scored
from ray_ep.rank.joining import JoiningRank
from ray_ep.rank.model_rank import ModelRank

log = logging.getLogger("ray_ep.rank")

NEWS_S = 0.5
"""Seconds after which news are told at the latest, if only of figures."""


@dataclass(frozen=True, slots=True)
class News:
    """What a rank tells: of requests since the last time, of itself now, and why it has failed; "": it has not."""

    deltas: list[Delta]
    status: RankStatus
    failed: str


@ray.remote(  # type: ignore[call-overload]
    max_restarts=0, max_task_retries=0, concurrency_groups={"control": 2, "requests": 1, "news": 1}
)
class GeneratorActor(JoiningRank):
    """One rank that generates."""

    def build(
        self,
        cfg: dict[str, Any],
        config: PreTrainedConfig,
        corpus: None,
        placement: Placement,
        topology: Topology,
    ) -> dict[str, int]:
        """Load the model on the joined group (collective); returns sizes for people."""
        where = (groups_of(topology), self.device, topology)
        self.model = ModelRank(from_dict(cfg), config, self.group, placement, *where)
        self._news: list[Delta] = []
        self._told = threading.Condition()
        self.generator = Generator(self.model, self._tell)
        return {"parameters": sum(p.numel() for p in self.model.model.parameters())}

    def _tell(self, deltas: list[Delta]) -> None:
        with self._told:
            self._news += deltas
            self._told.notify()

    def choose_exchange(self, step: int) -> Choice:
        """`Generator.choose_exchange` among the groups that were joined; the others are left."""
        choice = self.generator.choose_exchange(dict(self.group.transports))
        self.group.keep(choice.transport)
        return choice

    def open(self) -> tuple[Limits, str]:
        """`Generator.open`; what a request may have, and why batches are static ("": they are not)."""
        limits = self.generator.open()
        log.info("opened context=%d static=%s", limits.context, self.generator.note or "no")
        return limits, self.generator.note or ""

    def close_batches(self, hard: bool) -> None:
        """`Generator.close`."""
        self.generator.close(hard)

    @ray.method(concurrency_group="requests")
    def submit(self, requests: Sequence[Request], cancel: Sequence[str] = ()) -> None:
        """`Generator.submit`."""
        self.generator.submit(requests, cancel)

    @ray.method(concurrency_group="news")
    def news(self) -> News:
        """What is new, as soon as something is, or after NEWS_S."""
        with self._told:
            self._told.wait_for(lambda: bool(self._news), NEWS_S)
            deltas, self._news = self._news, []
        return News(deltas, self.generator.status(), self.generator.failed)

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """`Generator.score`."""
        return self.generator.score(rows)

    def move(self, placement: Placement, buffer_mb: float) -> Moved:
        """`Generator.move`."""
        moved = self.generator.move(placement, buffer_mb)
        log.info("moved placement=%d received=%d bytes seconds=%.3f", placement.version, moved.received, moved.seconds)
        return moved

    @ray.method(concurrency_group="control")
    def statistics(self) -> RoutingStatistics:
        """`ModelRank.statistics`."""
        return self.model.statistics()
