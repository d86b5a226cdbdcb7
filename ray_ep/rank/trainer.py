"""Training on one rank: the step, evaluation, saving and loading. A plain class; the Ray actor is a shell around it.

All methods that compute are collective: every rank of the group calls them with the same arguments.
B sequences of the global batch, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import time
from dataclasses import astuple
from functools import partial
from math import isfinite, log
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.errors import DivergedError
from ray_ep.moe import Choice, Moved, update_bias
from ray_ep.placement import Placement
from ray_ep.rank.broken_off import Before
from ray_ep.rank.clock import StepClock
from ray_ep.rank.data.corpus import Corpus, global_batch, held_out_batch
from ray_ep.rank.diverged import bad_weight, locate
from ray_ep.rank.evaluation import evaluate
from ray_ep.rank.memory import peak_mib
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.optimizer import MasterOptimizer
from ray_ep.rank.passes import Passes
from ray_ep.rank.pays import Pays, uneven_ranks
from ray_ep.rank.results import StepResult, Usage
from ray_ep.rank.saved.checkpoint import Checkpoint, load_rank, save_rank
from ray_ep.rank.saved.directory import Directory

REMEDY = "Lower optim.learning_rate, raise optim.warmup_steps, set optim.clip_norm (1 is usual), or look at the data"


class Trainer:
    """Trains the model of one rank.

    Args:
        corpus: the same on every rank; the batch is cut from it by (seed, step).
    """

    def __init__(self, rank: ModelRank, corpus: Corpus):
        self.rank, self.corpus, self.cfg = rank, corpus, rank.cfg
        self.model, self.ep, self.device = rank.model, rank.ep, rank.device
        tokens = self.cfg.batch.sequences * self.cfg.batch.length / self.group.size  # of this rank in a step
        self.ep.counters.window = round(self.cfg.placement.decay / log(2) * tokens)
        self.clock = StepClock(self.ep.meter.seconds)
        self.optimizer = MasterOptimizer(self.model, self.cfg.optim, self.clock.enter)
        self.pays = Pays() if self.cfg.balance.in_step == "auto" and self.group.size > 1 else None
        self._told = False  # what balance costs
        self.passes = Passes(rank)
        self.draws, self.stop = self.passes.draws, self.passes.stop
        self._first_step: int | None = None  # of this process

    @property
    def group(self) -> Group:
        """The group that all ranks of the run are in."""
        return self.ep.group

    def choose_exchange(self, step: int, groups: dict[str, Group]) -> Choice:
        """`ModelRank.choose_exchange`, timed on the routing of the batch of `step` (collective, before training)."""
        part = np.split(self._batch(step), self.cfg.batch.accumulation)[0]
        forward = lambda: self.passes.cross_entropy(self.passes.share(part))  # noqa: E731
        return self.rank.choose_exchange(groups, forward, backward=True)

    def train_step(self, step: int) -> StepResult | None:
        """One optimizer step (step counts from 0) over this rank's share of the global batch.

        Returns:
            None: it was broken off between two passes (`stop`), on every rank, and nothing of it is left.

        Raises:
            DivergedError: a loss or a gradient is not finite, on every rank; the model is as it was before.
        """
        cfg, began = self.cfg, self.usage()
        self.clock.enter("data")
        batch = self._batch(step)
        losses = torch.zeros(4, dtype=torch.float64, device=self.device)  # main, aux, z; seconds
        self.model.train()
        passes = [
            partial(self.passes.loss, part, step, n) for n, part in enumerate(np.split(batch, cfg.batch.accumulation))
        ]
        before = Before(self.model) if len(passes) > 1 else None
        for number, forward in enumerate(passes):
            if before is not None and number and self.passes.leaving():
                before.restore()
                self.optimizer.discard()
                self.clock.enter("")
                return None
            self.clock.enter("forward")
            loss, figures = forward()
            self.clock.enter("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.clock.enter("rest")
            self.optimizer.accumulate()
            losses[:3] += figures
        norm = self.optimizer.step(step, losses[:3])
        self.clock.enter("rest")
        self._first_step = step if self._first_step is None else self._first_step
        if not isfinite(norm):
            raise self._diverged(step, losses[:3], passes)
        losses[3] = time.perf_counter() - began.seconds
        self.group.all_reduce(losses)
        load = self.ep.counters.take_step()
        self.group.all_reduce(load)
        update_bias(self.ep.routing.routers, load, cfg.router.bias_rate)
        main, aux, z, seconds = losses.tolist()
        rate, tokens = self.optimizer.learning_rate(step), int(batch.shape[0] * cfg.batch.length)
        counts = load.cpu().numpy()
        notes = self._balance(seconds / self.group.size, counts), self.draws.news()
        self.clock.enter("")
        peak = peak_mib(self.device)
        return StepResult(step, main, aux, z, norm, rate, tokens, counts, self.usage() - began, peak, *notes)

    def evaluate(self, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]] | None:
        """Mean loss on the held-out split, equal on every rank; with `trace` also which rank's expert answered.

        The trace has one entry a MoE layer: experts and ranks [T, K] of this rank's tokens. None: it was broken off
        between two passes (`stop`), on every rank.
        """
        batch = held_out_batch(self.corpus.held_out, self.cfg.eval.sequences, self.cfg.batch.length)
        return evaluate(self.passes, batch, trace)

    def migrate(self, placement: Placement, buffer_mb: float = 256) -> Moved:
        """`ModelRank.migrate`, masters and moments with their primaries (between steps)."""
        return self.rank.migrate(placement, buffer_mb, self.optimizer)

    def save(self, url: str, step: int) -> dict[str, list[Any]]:
        """Write what this rank owns into checkpoint `step`; returns its part of the manifest. Not collective.

        Raises:
            DivergedError: a weight or a moment is not finite; nothing was written here.
        """
        if name := self.optimizer.damaged():
            raise DivergedError(
                f"step {step} diverged: its update left values that are not finite in {name} on rank "
                f"{self.group.rank}; it was not saved, earlier checkpoints stay. {REMEDY}"
            )
        return save_rank(Directory(url), step, self.model, self.optimizer)

    def load(self, url: str, step: int) -> None:
        """Take on checkpoint `step`."""
        load_rank(Checkpoint(Directory(url), step), self.model, self.optimizer)

    def usage(self) -> Usage:
        """Totals since this rank's making, by its own clock."""
        meter, counters = self.ep.meter, self.ep.counters
        now, exchange, experts = time.perf_counter(), meter.seconds["exchange"], meter.seconds["experts"]
        balance = np.array(astuple(self.ep.balancer.done), np.float64)
        phases = np.array(list(self.clock.seconds.values()))
        return Usage(now, exchange, experts, counters.seconds, meter.sent.copy(), meter.pairs.copy(), balance, phases)

    def _batch(self, step: int) -> np.ndarray:
        """[B, length + 1] the global batch."""
        cfg = self.cfg
        return global_batch(self.corpus.train, cfg.seed, step, cfg.batch.sequences, cfg.batch.length)

    def _balance(self, seconds: float, load: np.ndarray) -> str:
        """Keep or change how the next step is balanced; what there is to say of it."""
        notes = [] if self._told else [self.ep.balancer.words()]
        self._told = True
        if self.pays is not None:
            notes.append(self.pays.step(seconds, uneven_ranks(load, self.ep.placement.owner, self.group.size)))
            self.ep.balancer.active = self.pays.on
        return "; ".join(filter(None, notes))

    def _diverged(self, step: int, losses: torch.Tensor, passes: list[Any]) -> DivergedError:
        """What to say of a step that is not finite: where it comes from, and what can be done (collective)."""
        self.group.all_reduce(losses)
        what = f"step {step + 1} diverged (loss {losses[0]:g}, auxiliary {losses[1]:g}, z {losses[2]:g})"
        if weight := bad_weight(self.model, self.group):
            if step == self._first_step:
                return DivergedError(
                    f"{what}: weights that this run started from are not finite, first {weight}; start from another "
                    "checkpoint"
                )
            where = f"weights are not finite since the update of step {step}, first {weight}"
        else:
            self.ep.counters.enabled = False
            where = f"values are not finite, {locate(self.model, self.group, passes)}"
        return DivergedError(
            f"{what}: {where}. This step was neither applied nor saved; earlier checkpoints stay. {REMEDY}"
        )
