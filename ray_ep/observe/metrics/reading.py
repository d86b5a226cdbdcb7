"""From what a run says of itself to the figures that it exports: its records, its events, its directory.

The driver writes the directory before it speaks of it. A step is counted when it ends; what the newest one was is
worked out when figures are taken, a few times a minute. No Ray. L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ray_ep.driver.records import Event, StepRecord
from ray_ep.errors import PlacementError
from ray_ep.observe.metrics.figures import Figures, Taken
from ray_ep.observe.metrics.happenings import Happenings
from ray_ep.observe.metrics.links import tell_links
from ray_ep.observe.metrics.table import PLACES
from ray_ep.placement import Placement, Topology
from ray_ep.placement.migration import moves


class Reading:
    """Fills in the figures of one run: a listener of the driver; another thread takes them.

    The first step after ranks have formed is a warm-up: it counts as a step, its times are left out.

    Args:
        path: the run directory. clock: seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self._path, self._clock, self._figures = path, clock, Figures()
        self._happenings = Happenings(self._figures, clock)
        self._newest: StepRecord | None = None
        self._timed: StepRecord | None = None  # the newest that was no warm-up
        self._placement: Placement | None = None
        self._first_links: Topology | None = None  # as these ranks measured them first
        self._links_due = True
        self._pairs = np.zeros(0)  # [R] computed so far by the ranks of each number

    def start(self, event: Event) -> None:
        """The ranks are ready."""
        said, put = event.fields, self._figures.put
        put("ep_run_info", 1, *(said.get(name, "") for name in ("model", "layers", "experts")))
        for state in ("desired", "active", "allocated"):
            put("ep_ranks", said.get("ranks", 0), state)
        for state in ("joining", "waiting", "ready"):
            put("ep_ranks", 0, state)
        put("ep_last_step_timestamp_seconds", self._clock())
        for name in ("ep_slow_ranks", "ep_rebalance_stalled"):
            put(name, 0)
        put("ep_slow_rank_times", 1)
        self._read_links()

    def event(self, event: Event) -> None:
        """Something happened."""
        self._links_due |= event.kind == "topology"
        self._happenings.tell(event)

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        formed = self._newest is None or record.epoch != self._newest.epoch
        if formed:
            self._first_links = None
        if formed or self._links_due:
            self._read_links()
        self._count(record)
        self._figures.put("ep_last_step_timestamp_seconds", self._clock())
        if not formed:
            self._figures.observe("ep_step_seconds", record.step_seconds)
            self._figures.add("ep_stepping_seconds_total", record.step_seconds)
            self._timed = record
        self._moved(record.placement_version)
        self._newest = record

    def take(self) -> Taken:
        """All figures as they are now; any thread may take them."""
        newest, timed = self._newest, self._timed
        if newest is not None:
            self._tell(newest)
            self._routing(newest)
        if timed is not None:
            self._figures.put("ep_tokens_per_second", timed.tokens_per_second)
            for phase, seconds in timed.phase_seconds.items():
                self._figures.put("ep_step_phase_seconds", seconds, phase)
        return self._figures.take()

    def _count(self, record: StepRecord) -> None:
        add = self._figures.add
        add("ep_steps_total", 1)
        add("ep_tokens_total", record.tokens)
        add("ep_exchange_bytes_total", record.bytes_intra_node, "intra_node")
        add("ep_exchange_bytes_total", record.bytes_inter_node, "inter_node")
        add("ep_guests_total", record.guests)
        add("ep_guest_bytes_total", record.guest_bytes)
        move = record.migration_seconds or 0.0
        add("ep_standing_seconds_total", move, "move")
        add("ep_standing_seconds_total", (record.rebalance_seconds or 0.0) - move, "planning")
        if record.eval_loss is not None:
            self._figures.put("ep_eval_loss", record.eval_loss)
        ranks = record.rank_load.sum(0, dtype=np.float64)  # [R]
        before = self._pairs  # of more ranks, or fewer
        pairs = np.zeros(max(len(before), len(ranks)))
        pairs[: len(before)] += before
        pairs[: len(ranks)] += ranks
        self._pairs = pairs

    def _tell(self, record: StepRecord) -> None:
        put = self._figures.put
        put("ep_step", record.step)
        put("ep_loss", record.loss)
        put("ep_grad_norm", record.grad_norm)
        put("ep_learning_rate", record.lr)
        put("ep_peak_memory_bytes", record.peak_mib * 2**20)
        put("ep_epoch", record.epoch)
        put("ep_placement_version", record.placement_version)
        put("ep_ranks", record.world_size, "active")
        put("ep_ranks", record.world_size + self._happenings.coming, "allocated")
        put("ep_imbalance", record.imbalance_before, "before")
        put("ep_imbalance", record.imbalance_after, "after")
        put("ep_balance_saved_seconds", record.balance_saved_predicted, "predicted")
        put("ep_balance_saved_seconds", record.balance_saved_measured, "measured")

    def _routing(self, record: StepRecord) -> None:
        """Balance over ranks, hottest experts, and the load of each rank."""
        put, load = self._figures.put, record.load.astype(np.float64)  # [L, E]
        ranks = record.rank_load.astype(np.float64)  # [L, R]
        even = np.divide(ranks.mean(1), ranks.max(1), out=np.ones(len(ranks)), where=ranks.max(1) > 0)
        for layer, value in enumerate(even.tolist()):
            put("ep_balancedness", value, layer)
        hottest = np.argsort(-load, axis=1, kind="stable")[:, :PLACES]  # [L, places]
        times = np.take_along_axis(load, hottest, 1) / np.maximum(load.mean(1, keepdims=True), 1e-9)
        for layer, (experts, values) in enumerate(zip(hottest.tolist(), times.tolist(), strict=True)):
            for place, (expert, value) in enumerate(zip(experts, values, strict=True), 1):
                put("ep_hottest_expert_load", value, layer, place)
                put("ep_hottest_expert_id", expert, layer, place)
        for rank, total in enumerate(self._pairs.cumsum().tolist()):
            self._figures.count("ep_rank_pairs_total", total, rank)

    def _moved(self, version: int) -> None:
        """Experts may sit elsewhere since the step before; those of other ranks are not compared."""
        if self._placement is not None and self._placement.version == version:
            return
        before, self._placement = self._placement, None
        with suppress(PlacementError):
            self._placement = Placement.load(self._path / "placements" / f"{version:04d}.json")
            if before is not None and before.num_ranks == self._placement.num_ranks:
                self._figures.add("ep_migrated_experts_total", len(moves(before, self._placement)))

    def _read_links(self) -> None:
        """What topology.json says of them."""
        self._links_due = False
        with suppress(OSError, PlacementError):
            now = Topology.from_json((self._path / "topology.json").read_text("utf-8"))
            if self._first_links is None or self._first_links.num_ranks != now.num_ranks:
                self._first_links = now
            tell_links(self._figures, now, self._first_links)
