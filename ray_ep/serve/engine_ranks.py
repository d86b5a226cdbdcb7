"""The rank actors of an engine: `Ranks` whose actors generate. One method for each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from omegaconf import OmegaConf
from ray.exceptions import RayError
from transformers import PreTrainedConfig

from ray_ep.config.schema import ClusterConfig, Config
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.moe import Moved
from ray_ep.placement import Placement, Topology
from ray_ep.rank.generate.actor import GeneratorActor, News
from ray_ep.rank.generate.requests import Limits, Request
from ray_ep.rank.generate.score import Row, Scored


class GeneratingRanks(Ranks):
    """The rank actors of an engine."""

    def __init__(self, cfg: ClusterConfig, name: str, local: bool, interrupted: Callable[[], bool]):
        self._news: dict[Any, int] = {}
        super().__init__(cfg, name, local, interrupted, GeneratorActor)

    def load_model(self, cfg: Config, config: PreTrainedConfig, placement: Placement, topology: Topology) -> None:
        """Load the model on every rank."""
        self._call("build", OmegaConf.to_container(cfg), config, None, placement, topology)

    def open(self) -> tuple[Limits, str]:
        """Begin to take requests: what one may have, and why batches are static ("": they are not)."""
        limits, note = self._call("open")[0]
        return limits, note

    def close(self, hard: bool) -> None:
        """Take no more requests; those that are open are answered, or (hard) failed."""
        self._call("close_batches", hard)

    def submit(self, rank: int, requests: Sequence[Request], cancel: Sequence[str] = ()) -> None:
        """Hand requests to a rank; none: wake it. Does not wait."""
        self.actors[rank].submit.remote(requests, cancel)

    def move(self, placement: Placement, buffer_mb: float) -> list[Moved]:
        """Have the experts moved between two passes. Raises BadInput: every rank has refused, nothing has changed."""
        return self._call("move", placement, buffer_mb, title=f"move to placement {placement.version}")

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """Scores in the order of `rows`, which are dealt out to the ranks by their length."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
        size = len(self.actors)
        shares = [order[rank::size] for rank in range(size)]
        answers = self._call("score", each=[([rows[i] for i in share],) for share in shares])
        found = {
            i: scored
            for share, told in zip(shares, answers, strict=True)
            for i, scored in zip(share, told, strict=True)
        }
        return [found[i] for i in range(len(rows))]

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Inside: calls are made by threads that no signal interrupts."""
        interrupted, self._interrupted = self._interrupted, bool
        try:
            yield
        finally:
            self._interrupted = interrupted
            self._news.clear()

    def news(self, wait_s: float) -> list[tuple[int, News]]:
        """What ranks have told, within about `wait_s`; those that are dead tell nothing."""
        asked = set(self._news.values())
        self._news |= {actor.news.remote(): rank for rank, actor in enumerate(self.actors) if rank not in asked}
        ray.wait(list(self._news), num_returns=1, timeout=wait_s)
        ready = ray.wait(list(self._news), num_returns=len(self._news), timeout=0)[0]
        told = []
        for ref in ready:
            rank = self._news.pop(ref)
            try:
                told.append((rank, ray.get(ref)))
            except RayError:
                continue  # `alive` says why
        return told

    def alive(self) -> bool:
        """Whether no rank is known to be dead or silent. Does not wait."""
        silent, dead = self._heartbeat.look()
        return not silent and not dead
