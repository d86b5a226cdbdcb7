"""Which tokens of a rank's training steps are recorded, and what is said of them once a step's passes are over.

Whether a token is sampled follows from (seed, step, position in the global batch) alone: not from the number of ranks.
Who answered for it is the layers' to say (ray_ep.moe.recorder). n sampled tokens, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ray_ep.config.provenance import sample_of
from ray_ep.moe import Recorder
from ray_ep.placement import Placement
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.recorded import AFTER, BEFORE, Recorded


def sampled(seed: int, step: int, positions: np.ndarray, rate: float) -> np.ndarray:
    """Whether each of `positions` int64 [n] of the global batch of `step` is sampled: bool [n]; pure.

    A hash of the three (SplitMix64: Steele, Lea and Flood, OOPSLA 2014) falls below the rate. A sample of a smaller
    rate is a part of one of a greater rate.
    """
    with np.errstate(over="ignore"):
        key = _mixed(_mixed(np.uint64(seed)) + np.uint64(step))
        number = _mixed(key + positions.astype(np.uint64))
    return np.asarray((number >> np.uint64(11)) * 2.0**-53 < rate)


def _mixed(x: np.ndarray | np.uint64) -> np.ndarray:
    x = np.asarray(x + np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class Recording:
    """Records of one rank's training steps, as provenance.sample asks for them."""

    def __init__(self, rank: ModelRank, corpus: Corpus):
        self.rank, self.corpus, self.cfg = rank, corpus, rank.cfg
        self.sample = sample_of(rank.cfg.provenance.sample)
        self._holds: tuple[Placement, np.ndarray] | None = None
        self.forget()

    def forget(self) -> None:
        """Nothing is recorded: the step that was under way is broken off."""
        self._recorder: Recorder | None = None
        # of each pass: positions [n], offsets [n], contexts [n, W]
        self._tokens: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @contextmanager
    def of_pass(self, step: int, number: int, first: int, rows: Batch) -> Iterator[None]:
        """Inside: the forward of pass `number` of `step` (both from 0) over this rank's rows.

        Args:
            first: number of the first row in the global batch.
        """
        if not number:
            self.forget()
        rate = self.sample.of_step(step + 1)
        if not rate:
            yield
            return
        ep, length = self.rank.ep, self.cfg.batch.length
        if self._recorder is None:
            self._recorder = Recorder(len(ep.layers), ep.num_experts)
        positions = first * length + np.arange(len(rows) * length)
        offsets = rows.offsets.reshape(-1)  # padding is never sampled
        chosen = np.flatnonzero(sampled(self.cfg.seed, step + 1, positions, rate) & (offsets >= 0))
        around = contexts(rows, chosen // length, chosen % length)
        self._tokens.append((positions[chosen], offsets[chosen], around))
        with ep.recording(self._recorder, chosen, len(rows) * length):
            yield

    def collect(self) -> Recorded | None:
        """What was recorded of the step whose passes are over; None: nothing (collective in a step that is recorded).

        Raises:
            GroupError: a peer is gone.
        """
        if self._recorder is None:
            return None
        ep = self.rank.ep
        answers = self._recorder.collect(ep.group)
        position, offset, context = (np.concatenate(parts) for parts in zip(*self._tokens, strict=True))
        recorded = Recorded(
            rank=ep.group.rank,
            position=position,
            context=context,
            document=np.searchsorted(self.corpus.starts, offset, side="right") - 1,
            offset=offset,
            experts=answers.experts,
            weights=answers.weights,
            ranks=answers.ranks,
            kinds=kinds_of(answers.experts, answers.ranks, ep.placement.owner, self._held(ep.placement)),
            version=ep.placement.version,
            epoch=ep.group.epoch,
        )
        self.forget()
        return recorded

    def _held(self, placement: Placement) -> np.ndarray:
        """bool [L, E, R] whether a rank has the expert in a slot."""
        if self._holds is None or self._holds[0] is not placement:
            holds = np.zeros((placement.num_layers, placement.num_experts, placement.num_ranks), np.bool_)
            layer, rank, _ = np.nonzero(placement.slots >= 0)
            holds[layer, placement.slots[placement.slots >= 0], rank] = True
            self._holds = placement, holds
        return self._holds[1]


def kinds_of(experts: np.ndarray, ranks: np.ndarray, owner: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """int8 [L, n, K] into `ray_ep.rank.recorded.KINDS` for experts and ranks [L, n, K]; -1 where there is none.

    Args:
        owner: [L, E] rank of the primary. holds: bool [L, E, R].
    """
    layer = np.arange(len(experts))[:, None, None]
    kinds = np.where(owner[layer, experts] == ranks, 0, np.where(holds[layer, experts, ranks], 1, 2))
    return np.where((experts >= 0) & (ranks >= 0), kinds, -1).astype(np.int8)


def contexts(rows: Batch, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """[n, BEFORE + 1 + AFTER] ids around tokens (row, column) [n]; what a row's last predicts is one; -1 beyond it."""
    ids = np.concatenate([rows.ids, rows.targets[:, -1:].clip(-1)], 1)  # [b, T + 1]
    at = column[:, None] + np.arange(-BEFORE, AFTER + 1)
    inside = (at >= 0) & (at < ids.shape[1])
    found = ids[row[:, None], np.where(inside, at, 0)] if len(row) else np.zeros(at.shape, np.int64)
    return np.where(inside, found, -1)
