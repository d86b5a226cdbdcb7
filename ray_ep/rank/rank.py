"""One rank's work: the train step, evaluation, saving and loading. A plain class; the Ray actor is a shell around it.

All methods that compute are collective: every rank of the group calls them with the same arguments.
B sequences of the global batch, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from math import ceil, isfinite, log
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ray_ep.collective import Group
from ray_ep.config.schema import Config
from ray_ep.errors import DivergedError, ModelError
from ray_ep.moe import (
    KINDS,
    Choice,
    Draws,
    ExpertParallel,
    Limits,
    Moved,
    apply_placement,
    choose,
    router_losses,
    settle,
    update_bias,
)
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.rank.balancing import balancing
from ray_ep.rank.broken_off import Before, evaluation_parts, leaving
from ray_ep.rank.clock import StepClock
from ray_ep.rank.data.corpus import Corpus, global_batch, held_out_batch
from ray_ep.rank.diverged import bad_weight, locate
from ray_ep.rank.loss import summed_cross_entropy
from ray_ep.rank.memory import peak_mib
from ray_ep.rank.model import build
from ray_ep.rank.optimizer import MasterOptimizer
from ray_ep.rank.pays import Pays, uneven_ranks
from ray_ep.rank.saved.checkpoint import Checkpoint, load_rank, save_rank
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.trial import unseen

CHOICE_S = 1.2
"""Time that the choice of the exchange may take, beside one forward pass and a first round of every way."""

REMEDY = "Lower optim.learning_rate, raise optim.warmup_steps, set optim.clip_norm (1 is usual), or look at the data"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one rank spent; `later - earlier` is what it spent in between."""

    seconds: float
    exchange_seconds: float  # waiting for peers included
    expert_seconds: float
    statistics_seconds: float
    sent: np.ndarray  # [R] bytes sent to each rank
    pairs: np.ndarray  # [L] (token, expert) pairs computed here
    balance: np.ndarray  # the fields of ray_ep.moe.Balance in order, as numbers
    phases: np.ndarray  # seconds of train steps by STEP_PHASES

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank says about one step. All but `usage` is global and equal on every rank.

    `note` is what there is to say of the balance inside the step, `warning` of random draws; seldom anything.
    """

    step: int
    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    lr: float
    tokens: int
    load: np.ndarray  # [L, E] tokens each expert received in the step
    usage: Usage
    peak_mib: int = 0  # memory that this rank's process has had at most; of its GPU, on one
    note: str = ""
    warning: str = ""


class Rank:
    """One rank of a group.

    Args:
        config: the transformers config of the model.
        corpus: the same on every rank; the batch is cut from it by (seed, step).
        node_of: [R] node of each rank, or group of fast links.
        device: where this rank computes; the group must take its tensors. Only cpu has been run yet.
        topology: links, for the balance inside the step; None, or not measured: it measures a few itself.
    """

    def __init__(
        self,
        cfg: Config,
        config: PreTrainedConfig,
        corpus: Corpus,
        group: Group,
        placement: Placement,
        node_of: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        topology: Topology | None = None,
    ):
        self.cfg, self.corpus, self.group, self.device = cfg, corpus, group, torch.device(device)
        sample = cfg.statistics.sample // group.size
        options = {"node_of": node_of, "sample": sample, "device": self.device, "balance": cfg.balance.in_step}
        options["limits"] = Limits(cfg.balance.guest_mb, cfg.balance.most, _links(topology))
        self.model = build(cfg.model, config, cfg.seed, group, placement, **options)
        self.ep: ExpertParallel = self.model.ray_ep
        self.ep.routing.force = cfg.router.force
        tokens = cfg.batch.sequences * cfg.batch.length / group.size  # of this rank in a step
        self.ep.counters.window = round(cfg.placement.decay / log(2) * tokens)
        way = cfg.exchange
        self.ep.exchange_by(chunks=way.chunks, float8=way.float8, tokens=way.tokens)
        self.clock = StepClock(self.ep.meter.seconds)
        self.optimizer = MasterOptimizer(self.model, cfg.optim, group, self.clock.enter)
        self.pays = Pays() if cfg.balance.in_step == "auto" and group.size > 1 else None
        self._told = False  # what balance costs
        self.balancing = balancing(cfg, config)
        self.top_k = int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 1)
        self.ep.routing.draws = self.draws = Draws(cfg.seed, self.device)
        self._first_step: int | None = None  # of this process
        self.stop = threading.Event()  # set by another thread: leave at the next pass, once all ranks have agreed

    @torch.no_grad()
    def choose_exchange(self, step: int, groups: dict[str, Group]) -> Choice:
        """Take the fastest way to exchange, timed on the routing of the batch of `step` (collective, before training).

        Nothing that a step depends on or reports is changed, but the groups: those not taken are the caller's to close.

        Args:
            groups: transports to choose from, by name.
        """
        cfg = self.cfg
        kinds = KINDS if cfg.exchange.kind == "auto" else (cfg.exchange.kind,)
        if len(groups) == 1 and (self.group.size == 1 or len(kinds) == 1):
            tokens = cfg.batch.sequences * cfg.batch.length / cfg.batch.accumulation  # of all ranks in a pass
            return settle(self.ep, kinds[0], groups, ceil(tokens * self.top_k / self.ep.num_experts))
        layer = self.ep.layers[len(self.ep.layers) // 2]
        batch = global_batch(self.corpus.train, cfg.seed, step, cfg.batch.sequences, cfg.batch.length)
        part = np.split(batch, cfg.batch.accumulation)[0]
        with unseen(self.model):
            with self.ep.capturing(layer.index) as capture:
                self._cross_entropy(self._share(part))
            if capture.work is None:
                raise self._never_called()
            choice = choose(self.ep, capture.work, layer.index, groups, kinds=kinds, backward=True, budget_s=CHOICE_S)
        self.group = self.optimizer.group = self.ep.group
        return choice

    def train_step(self, step: int) -> StepResult | None:
        """One optimizer step (step counts from 0) over this rank's share of the global batch.

        Returns:
            None: it was broken off between two passes (`stop`), on every rank, and nothing of it is left.

        Raises:
            DivergedError: a loss or a gradient is not finite, on every rank; the model is as it was before.
        """
        cfg, began = self.cfg, self.usage()
        self.clock.enter("data")
        batch = global_batch(self.corpus.train, cfg.seed, step, cfg.batch.sequences, cfg.batch.length)
        losses = torch.zeros(4, dtype=torch.float64, device=self.device)  # main, aux, z; seconds
        self.model.train()
        passes = [partial(self._loss, part, step, n) for n, part in enumerate(np.split(batch, cfg.batch.accumulation))]
        before = Before(self.model) if len(passes) > 1 else None
        for number, forward in enumerate(passes):
            if before is not None and number and leaving(self.stop, self.group, self.device):
                before.restore()
                self.optimizer.discard()
                self.clock.enter("")
                return None
            self.clock.enter("forward")
            loss, figures = forward()
            self.clock.enter("backward")
            loss.backward()
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

    @torch.no_grad()
    def evaluate(self, trace: bool = False) -> tuple[float, list[dict[str, np.ndarray]]] | None:
        """Mean loss on the held-out split, equal on every rank; with `trace` also which rank's expert answered.

        The trace has one entry a MoE layer: experts and ranks [T, K] of this rank's tokens. None: it was broken off
        between two passes (`stop`), on every rank.
        """
        batch = held_out_batch(self.corpus.held_out, self.cfg.eval.sequences, self.cfg.batch.length)
        self.model.eval()
        self.ep.counters.enabled = False
        mine = self._share(batch)
        first, total = self.ep.routing.first_token, torch.zeros(2, dtype=torch.float64, device=self.device)
        total[1] = mine[:, 1:].size
        left = False
        with self.ep.tracing() if trace else nullcontext([]) as traces:
            for number, (row, rows) in enumerate(evaluation_parts(mine, len(batch), self.cfg.batch)):
                if left := bool(number) and leaving(self.stop, self.group, self.device):
                    break
                self.ep.routing.first_token = first + row * self.cfg.batch.length
                total[0] += self._cross_entropy(rows)
        self.ep.counters.enabled = True
        if left:
            return None
        self.group.all_reduce(total)
        found = [
            {"experts": torch.cat([e for e, _ in x]).cpu().numpy(), "ranks": torch.cat([r for _, r in x]).cpu().numpy()}
            for x in traces
            if x
        ]
        return float(total[0] / total[1].clamp_min(1)), found

    def migrate(self, placement: Placement, buffer_mb: float = 256) -> Moved:
        """Take on another placement: experts move, masters and moments with their primaries (between steps).

        Raises:
            PlacementError, ModelError, GroupError: see ray_ep.moe.apply_placement; then nothing has changed.
        """
        return apply_placement(self.model, placement, buffer_mb=buffer_mb, state=self.optimizer)

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

    def statistics(self) -> RoutingStatistics:
        """Routing statistics of this rank since its making. Not collective."""
        return self.ep.counters.statistics()

    def sample(self) -> np.ndarray:
        """[L, N, K] expert sets of a reservoir of this rank's recent tokens (see placement.decay). Not collective."""
        return self.ep.counters.sets()

    def _balance(self, seconds: float, load: np.ndarray) -> str:
        """Keep or change how the next step is balanced; what there is to say of it."""
        notes = [] if self._told else [self.ep.balancer.words()]
        self._told = True
        if self.pays is not None:
            notes.append(self.pays.step(seconds, uneven_ranks(load, self.ep.placement.owner, self.group.size)))
            self.ep.balancer.active = self.pays.on
        return "; ".join(filter(None, notes))

    def _loss(self, part: np.ndarray, step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the loss of pass `number` over `part` [B, length + 1]; its figures main, aux, z."""
        passes, balancing = self.cfg.batch.accumulation, self.balancing
        mine, count = self._share(part), part[:, 1:].size
        first = number * len(part) + self.ep.routing.first_token // self.cfg.batch.length
        with self.draws.forward(step, first, len(mine), self.cfg.batch.length):
            main = self._cross_entropy(mine) / (count * passes)
        if not any(layer.calls for layer in self.ep.layers):
            raise self._never_called()
        routing = self.ep.routing
        load = self.ep.pass_load()
        how = balancing.form, self.top_k, (bool(balancing.coefficient), bool(balancing.z))
        losses = router_losses(routing.logits, load, routing.routers, self.group, count, *how)
        loss = main + (balancing.coefficient * losses.aux + balancing.z * losses.z) / passes
        figures = torch.stack([main.double(), losses.aux.double() / passes, losses.z.double() / passes])
        return loss, figures.detach()

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

    def _never_called(self) -> ModelError:
        return ModelError(f"{type(self.model).__name__} never called its experts through transformers' interface")

    def _share(self, batch: np.ndarray) -> np.ndarray:
        """Rows of the batch [B, length + 1] that are this rank's; there may be none."""
        low, high = (len(batch) * r // self.group.size for r in (self.group.rank, self.group.rank + 1))
        self.ep.routing.first_token = low * (batch.shape[1] - 1)
        return batch[low:high]

    def _cross_entropy(self, rows: np.ndarray) -> torch.Tensor:
        """Summed loss of predicting rows[:, 1:] from rows[:, :-1]; zero, with all exchanges made, if there are none."""
        if not len(rows):
            with self.ep.idle():
                padding = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
                return 0 * self.model(input_ids=padding, use_cache=False).logits.sum()
        ids = torch.from_numpy(rows).to(self.device)
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return summed_cross_entropy(logits, ids[:, 1:])

    def usage(self) -> Usage:
        """Totals since this rank's making, by its own clock."""
        meter, counters = self.ep.meter, self.ep.counters
        now, exchange, experts = time.perf_counter(), meter.seconds["exchange"], meter.seconds["experts"]
        balance = np.array(astuple(self.ep.balancer.done), np.float64)
        phases = np.array(list(self.clock.seconds.values()))
        return Usage(now, exchange, experts, counters.seconds, meter.sent.copy(), meter.pairs.copy(), balance, phases)


def _links(topology: Topology | None) -> Topology | None:
    """Measured links, with the groups that they make in place of what nodes are called; None: not measured."""
    if topology is None or topology.groups is None or not np.isfinite(topology.bandwidth).any():
        return None
    return replace(topology, node_of=topology.groups)
