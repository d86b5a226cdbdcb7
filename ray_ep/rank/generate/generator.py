"""One rank's part of generation: a `ModelRank`, and batches over it. Plain; the Ray actor is a shell around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import GenerationConfig

from ray_ep.moe import Choice, Moved
from ray_ep.placement import Placement
from ray_ep.rank.generate.batches import Batches
from ray_ep.rank.generate.lockstep import Lockstep
from ray_ep.rank.generate.paged import PagedBatches
from ray_ep.rank.generate.requests import Delta, Limits, RankStatus, Request
from ray_ep.rank.generate.score import Row, Scored, score
from ray_ep.rank.generate.trial import fault_of_pages
from ray_ep.rank.generate.whole import WholeBatches
from ray_ep.rank.model_rank import ModelRank

_DECODE = 8
"""Tokens of a rank in the pass on which the exchange is chosen: most passes have few."""


class Generator:
    """Answers requests on one rank. Calls said to be collective are made on every rank; other ranks' order is theirs.

    Args:
        tell: is given what is new of requests, from a thread of the batches.
    """

    def __init__(self, rank: ModelRank, tell: Callable[[list[Delta]], None]):
        self.rank, self.tell = rank, tell
        self.model: Any = rank.model
        self.model.train(False)
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # requests say everything
        self.lockstep = Lockstep(rank.group)
        self.note: str | None = None  # why batches are static; "": they are not; None: not tried yet
        self.batches: Batches | None = None
        self._inference = ExitStack()
        self._exchanged = 0.0  # seconds, before requests were taken

    def choose_exchange(self, groups: dict[str, Any]) -> Choice:
        """The fastest way to exchange in passes of few tokens (collective, before `open`)."""
        group = self.rank.group
        ids = torch.full((1, _DECODE), 3 + group.rank, device=self.rank.device)
        forward = lambda: self.model(input_ids=ids, use_cache=False)  # noqa: E731
        return self.rank.choose_exchange(groups, forward, _DECODE * group.size, backward=False)

    def open(self) -> Limits:
        """Begin to take requests (collective)."""
        model, cfg = self.model, self.rank.cfg.generate
        self._inference.enter_context(self.rank.ep.inference())
        if self.note is None:
            self.note = fault_of_pages(model, self.lockstep)
        kind = WholeBatches if self.note else PagedBatches
        self.batches = kind(model, self.lockstep, cfg, self.tell)
        text = model.config.get_text_config()
        context = getattr(text, "max_position_embeddings", None)
        longest = self.batches.longest
        self._exchanged = self.rank.ep.meter.seconds["exchange"]
        self.batches.start()
        return Limits(
            vocabulary=int(text.vocab_size), context=min(longest, context) if context else longest,
            cache_tokens=cfg.cache_tokens, requests=cfg.requests,
        )  # fmt: skip

    def close(self, hard: bool) -> None:
        """Answer what is open, or (hard) fail it, and take no more (collective)."""
        if self.batches is not None:
            self.batches.end(hard)
            self.batches = None
        self._inference.close()

    def submit(self, requests: Sequence[Request], cancel: Sequence[str] = ()) -> None:
        """Take requests in, then have some end early; nothing of both: others have work. Not collective."""
        assert self.batches is not None, "open comes first"
        for request in requests:
            self.batches.submit(request)
        for id in cancel:
            self.batches.cancel(id)
        self.batches.wake()

    def move(self, placement: Placement, buffer_mb: float) -> Moved:
        """Experts move between two passes; requests go on (collective).

        Raises:
            PlacementError, ModelError, GroupError: see ray_ep.moe.apply_placement; then nothing has changed.
        """
        if self.batches is None:
            return self.rank.migrate(placement, buffer_mb)
        with self.batches.pause():
            self._inference.close()  # packed weights are of the old placement
            try:
                return self.rank.migrate(placement, buffer_mb)
            finally:
                self._inference.enter_context(self.rank.ep.inference())

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """`ray_ep.rank.generate.score.score` (collective, while no requests are taken)."""
        assert self.batches is None, "close comes first"
        with self.rank.ep.inference():
            return score(self.rank, rows, self.rank.cfg.generate.pass_tokens)

    @property
    def failed(self) -> str:
        """Why this rank computes nothing any more; "": it does."""
        return self.batches.failed if self.batches is not None else ""

    def status(self) -> RankStatus:
        """Figures of now; what is outstanding is the engine's to know."""
        group, batches = self.rank.group, self.batches
        exchanged = self.rank.ep.meter.seconds["exchange"] - self._exchanged
        who = RankStatus(
            rank=group.rank, epoch=group.epoch, placement_version=self.rank.ep.placement.version,
            exchange_seconds=exchanged,
        )  # fmt: skip
        if batches is None:
            return who
        return RankStatus(
            rank=who.rank, epoch=who.epoch, placement_version=who.placement_version, exchange_seconds=exchanged,
            cached_tokens=batches.cached_tokens, passes=batches.passes, idle_passes=batches.idle_passes,
            tokens=batches.tokens, pass_seconds=batches.pass_seconds,
        )  # fmt: skip
