"""Training on one rank: the step, evaluation, saving and loading. A plain class; the Ray actor is a shell around it.

All methods that compute are collective: every rank of the group calls them with the same arguments.
B sequences of the global batch, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from functools import partial
from math import log
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.errors import DivergedError, GroupError
from ray_ep.moe import Choice, Moved, Rows, update_bias
from ray_ep.placement import Placement, Topology
from ray_ep.rank.data.batch import Batch
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.evaluation import evaluate
from ray_ep.rank.memory import peak_mib
from ray_ep.rank.model_rank import ModelRank
from ray_ep.rank.pays import Pays, uneven_ranks
from ray_ep.rank.recorded import Recorded
from ray_ep.rank.results import RankState, Reduced, StepResult, Usage
from ray_ep.rank.saved.checkpoint import Checkpoint, load_rank, save_rank
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.step.before import Before
from ray_ep.rank.step.clock import StepClock
from ray_ep.rank.step.diverged import bad_weight, locate
from ray_ep.rank.step.forward import Forward
from ray_ep.rank.step.optimizer import MasterOptimizer

REMEDY = "Lower optim.learning_rate, raise optim.warmup_steps, set optim.clip_norm (1 is usual), or look at the data"
"""What a user may change where a loss or gradient is not finite."""


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
        device = self.ep.meter if self.device.type == "cuda" else None
        self.clock = StepClock(self.ep.meter.seconds, device=device)
        self.optimizer = MasterOptimizer(self.model, self.cfg.optim, self.clock.enter)
        self.pays = self._fresh_pays()
        self._costs_told = False  # what balance costs
        self.forward = Forward(rank, corpus)
        self.draws, self.stop = self.forward.draws, self.forward.stop
        self._before: Before | None = None  # of a half step: state to go back to
        self._began = self.usage()  # of the last step: what had been spent at its begin
        self._tokens = 0  # of the global batch of the step that is made
        self._ready: Reduced | None = None  # between the reductions of a step and its update
        self._recorded: Recorded | None = None  # of the same step
        self._last: StepResult | None = None  # of the last step that was done in this process
        self._unpublished = self._torn = False  # see RankState

    @property
    def group(self) -> Group:
        """The group that all ranks of the run are in."""
        return self.ep.group

    def choose_exchange(self, step: int, groups: dict[str, Group]) -> Choice:
        """`ModelRank.choose_exchange`, timed on the routing of the batch of `step` (collective, before training)."""
        part = next(self._batch(step).parts(self.cfg.batch.accumulation))
        forward = lambda: self.forward.cross_entropy(self.forward.share(part))  # noqa: E731
        return self.rank.choose_exchange(groups, forward, part.tokens, backward=True)

    def train_step(self, step: int) -> StepResult | None:
        """One optimizer step (step counts from 0) over this rank's share of the global batch.

        Everything is computed and reduced; one last collective says that every rank got there; then comes the update,
        which is local, and primaries' new weights go to replicas. An error leaves a half step: `state` says where,
        `finish` and `publish` end it or `discard` undoes it, and then the next one may begin.

        Returns:
            None: it was broken off between two passes (`stop`), on every rank, and nothing of it is left.

        Raises:
            DivergedError: a loss or a gradient is not finite, on every rank; all is as it was before.
            GroupError: a peer is gone, or at another step.
        """
        self._begin()
        self.clock.enter("data")
        passes = self._passes(step)
        losses = torch.zeros(3, dtype=torch.float64, device=self.device)  # main, aux, z
        for number, forward in enumerate(passes):
            if number and self.forward.leaving():
                self.discard()
                return None
            self.clock.enter("forward")
            loss, figures = forward()
            self.clock.enter("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.clock.enter("rest")
            self.optimizer.accumulate()
            losses += figures
        self.optimizer.reduce()
        reduced = self._reduce(step, losses)
        if not reduced.finite:
            raise self._diverged(reduced, passes)
        self._recorded = self.forward.recording.collect()
        self._ready = reduced
        self._all_are_ready(reduced)
        self.finish(step)
        self.publish()
        return self._told(step)

    def finish(self, step: int) -> StepResult:
        """The local part of a step whose reductions are done here: no collective. Again it does nothing.

        A failure inside of it leaves weights that are partly old (`RankState.torn`).
        """
        if self._ready is None and self._last is not None and self._last.step == step:
            return self._last
        ready, began = self._ready, self._began
        assert ready is not None, f"step {step} is to be finished, this rank has {self.state()}"
        assert (ready.step, self._torn) == (step, False), f"step {step} is to be finished, this rank has {self.state()}"
        self._torn = True
        self.optimizer.update(step, ready.norm)
        self.clock.enter("rest")
        update_bias(self.ep.routing.routers, ready.load, self.cfg.router.bias_rate)
        self.ep.counters.take_step()
        self.ep.routing.forget()
        load = ready.load.cpu().numpy()
        notes = self._balance(ready.seconds / self.group.size, load), self.draws.news()
        rate, peak = self.optimizer.learning_rate(step), peak_mib(self.device)
        figures = ready.main, ready.aux, ready.z, ready.norm, rate, self._tokens
        self._last = StepResult(
            step, self.group.epoch, *figures, load, self.usage() - began, peak, *notes, self._recorded
        )
        self._before = self._ready = self._recorded = None
        self._torn, self._unpublished = False, True
        return self._last

    def publish(self) -> None:
        """Send primaries' weights to replicas (collective, after `finish`); it may be done again."""
        self.optimizer.publish()
        self.clock.enter("")
        self._unpublished = False

    def discard(self) -> None:
        """Undo a step that was broken off before its update: all is as it was before it. Not collective.

        Before anything else is done here, such as joining another group. With no half step it does nothing.
        """
        assert not self._torn, "a step failed in its update: this rank must be given up"
        if self._before is None:
            return
        self.optimizer.discard()
        self.forward.recording.forget()
        self._before.restore()
        self._before = self._ready = self._recorded = None

    def state(self) -> RankState:
        """Where this rank is. Not collective; between calls, or after one that failed."""
        ready = None if self._ready is None else self._ready.step
        return RankState(self.optimizer.updates, ready, self._unpublished, self._torn)

    def evaluate(self, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]] | None:
        """Mean loss on the held-out split, equal on every rank; with `trace` also which rank's expert answered.

        The trace has one entry a MoE layer: experts and ranks [T, K] of this rank's tokens. None: it was broken off
        between two passes (`stop`), on every rank.
        """
        batch = self.corpus.held_out_batch(self.cfg.eval.sequences, self.cfg.batch.length)
        return evaluate(self.forward, batch, trace)

    def migrate(self, placement: Placement, buffer_mb: float = 256) -> Moved:
        """`ModelRank.migrate`, masters and moments with their primaries (between steps)."""
        self._assert_whole()
        return self.rank.migrate(placement, buffer_mb, self.optimizer)

    def went_back(self) -> None:
        """Weights are those of an earlier step now, and replicas are made of them: nothing waits to be published."""
        self._last, self._unpublished = None, False

    def regroup(
        self, placement: Placement, topology: Topology, kept: Mapping[tuple[int, int], Rows] | None = None
    ) -> None:
        """`ModelRank.regroup` with masters and moments; whether balance pays is asked again (between steps).

        One that comes has been told before how many updates there were; dense weights are handed over after it.
        """
        self._assert_whole()
        equal = {"updates": self.optimizer.updates, "balance.in_step": self.cfg.balance.in_step}
        self.rank.regroup(placement, topology, kept, self.optimizer, equal)
        self.pays, self._costs_told = self._fresh_pays(), False

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
        pairs = meter.pairs.copy()  # first: on a GPU this waits for them, and then all phases have ended
        now, exchange, experts = time.perf_counter(), meter.seconds["exchange"], meter.seconds["experts"]
        balance = np.array(astuple(self.ep.balancer.done), np.float64)
        phases = np.array(list(self.clock.seconds.values()))
        return Usage(now, exchange, experts, counters.seconds, meter.sent.copy(), pairs, balance, phases)

    def _assert_whole(self) -> None:
        assert self._before is None, f"a half step was neither finished nor discarded: {self.state()}"

    def _fresh_pays(self) -> Pays | None:
        return Pays() if self.cfg.balance.in_step == "auto" and self.group.size > 1 else None

    def _batch(self, step: int) -> Batch:
        """The global batch."""
        return self.corpus.batch(self.cfg.seed, step, self.cfg.batch.sequences, self.cfg.batch.length)

    def _begin(self) -> None:
        """From now on `discard` puts all back."""
        self._assert_whole()
        assert not self._unpublished, f"replicas have old weights: publish them first, this rank has {self.state()}"
        self._began = self.usage()
        self._before = Before(self.model, self.ep.balancer, self.draws, self.clock)
        self.model.train()

    def _passes(self, step: int) -> list[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
        """The forwards of a step in order."""
        batch = self._batch(step)
        self._tokens, parts = batch.tokens, batch.parts(self.cfg.batch.accumulation)
        return [partial(self.forward.loss, part, step, n, batch.predictions) for n, part in enumerate(parts)]

    def _reduce(self, step: int, losses: torch.Tensor) -> Reduced:
        """Sum what is left over ranks in one message: squares of gradients, losses [3], seconds, loads (collective)."""
        load = self.ep.counters.step  # [L, E] of this rank
        self.group.wait()  # on a GPU, the time up to here has passed only then; the norm waits for it in any case
        seconds = torch.tensor([time.perf_counter() - self._began.seconds], dtype=torch.float64, device=self.device)
        figures = torch.cat([losses, seconds, load.flatten().double()])
        norm = self.optimizer.norm(figures)
        self.clock.enter("rest")
        main, aux, z, spent = figures[:4].tolist()
        return Reduced(step, norm, main, aux, z, spent, figures[4:].to(load.dtype).view_as(load))

    def _all_are_ready(self, reduced: Reduced) -> None:
        """The last collective: whoever leaves it knows that every rank has all that its update needs, and the same.

        Raises:
            GroupError: ranks are at other steps, in other epochs, or got other figures.
        """
        mine = torch.tensor([reduced.step, self.group.epoch, reduced.norm, reduced.main], dtype=torch.float64)
        everyone = self.group.all_gather(mine.to(self.device))
        self.group.wait()
        if not (everyone.cpu() == mine).all():
            found = "; ".join(f"rank {r}: {row}" for r, row in enumerate(everyone.tolist()))
            raise GroupError(f"ranks do not make the same step (step, epoch, norm, loss): {found}")

    def _told(self, step: int) -> StepResult:
        """What is said of a step that is done, with the time that publishing took."""
        assert self._last is not None
        assert self._last.step == step
        self._last = replace(self._last, usage=self.usage() - self._began)
        return self._last

    def _balance(self, seconds: float, load: np.ndarray) -> str:
        """Keep or change how the next step is balanced; what there is to say of it."""
        notes = [] if self._costs_told else [self.ep.balancer.words()]
        self._costs_told = True
        if self.pays is not None:
            notes.append(self.pays.step(seconds, uneven_ranks(load, self.ep.placement.owner, self.group.size)))
            self.ep.balancer.active = self.pays.on
        return "; ".join(filter(None, notes))

    def _diverged(self, reduced: Reduced, passes: list[Any]) -> DivergedError:
        """What to say of a step that is not finite: where it comes from, and what can be done (collective)."""
        step = reduced.step
        what = f"step {step + 1} diverged (loss {reduced.main:g}, auxiliary {reduced.aux:g}, z {reduced.z:g})"
        if weight := bad_weight(self.model, self.group):
            where = f"weights are not finite since the update of step {step}, first {weight}"
            if self._last is None:
                where = f"weights that this run started from are not finite, first {weight}"
        else:
            with self.ep.counters.off():
                where = f"values are not finite, {locate(self.model, self.group, passes)}"
        self.discard()
        if self._last is None and weight:
            return DivergedError(f"{what}: {where}; start from another checkpoint")
        return DivergedError(
            f"{what}: {where}. This step was neither applied nor saved; earlier checkpoints stay. {REMEDY}"
        )
