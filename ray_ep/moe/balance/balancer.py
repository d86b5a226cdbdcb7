"""Balance inside the step: from one layer's exact counts, who computes how many pairs, and whose weights travel.

The plan is pure (ray_ep.placement.in_step.rules); here are its measured costs. What travels then is guests.py.
E experts, R ranks.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.placement import Placement, Topology
from ray_ep.placement.in_step.rules import StepPlan, StepRules, balance_step, warm

MODES = ("off", "auto", "always")
"""Values of balance.in_step: never, where it pays, in every step."""

_TRIAL_ROWS = 256
"""Rows of the trial that measures what a pair costs."""

_TRIAL_BYTES = 1 << 20
"""Least bytes of the trial that measures bandwidth: a small expert alone would measure latency, which guests share."""

_TRIAL_ROWS_CUDA, _TRIAL_BYTES_CUDA = 1 << 13, 1 << 26
"""On a GPU, which has done less before the host has asked for it: that would be timed. Not run on a GPU yet."""

_TRIALS = 8
"""Trials after which a rank that is slower in all of them is taken to be slower."""

_SAME_SPEED = 1.5
"""Ranks whose trials differ by less count as equally fast."""

log = logging.getLogger("ray_ep")


@dataclass(slots=True)
class Balance:
    """What the balance of one rank's layers did; sums over layers and passes, forward only."""

    layers: int = 0
    before: float = 0.0  # slowest rank's load over the mean, as the nearest-replica rule would have it
    after: float = 0.0
    guests: int = 0  # in the whole group
    guest_bytes: int = 0  # their weights
    saved_seconds: float = 0.0  # predicted
    moved_pairs: float = 0.0  # pairs that the slowest rank was spared


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the balance of a model.

    Args:
        guest_mb: memory of a rank for guests. Kept until backward if it is enough for all layers, else of one layer at
            a time, and backward fetches them again. Between ranks of a host they lie with their lender: there what all
            its borrowers may have is the bound.
        most: no rank computes more than this times its fair share, whatever it costs.
        topology: measured links, groups of ranks joined by fast ones as its nodes; None: links inside a node count as
            those measured in the first pass, others as slow.
    """

    guest_mb: int = 512
    most: float = 2.0
    topology: Topology | None = None


class Balancer:
    """Plans of all layers of one model on one rank.

    Args:
        mode: off; auto and always: where it is predicted to pay, by costs measured in the first pass; always says so
            where it cannot.
    """

    def __init__(self, group: Group, layers: int, mode: str, limits: Limits):
        self.group, self.layers, self.mode = group, layers, mode
        self.guest_mb, self.most, self.topology = limits.guest_mb, limits.most, limits.topology
        self.done = Balance()
        self._rules: dict[tuple[int, bool], StepRules | None] = {}
        self._costs: tuple[np.ndarray, float] | None = None
        self.keep, self._told = True, False
        self.active = True  # off for a while: whoever times the steps decides
        self._min_pairs: int | None = None
        self._bytes = 0  # of an expert
        if mode == "always" and group.size == 1:
            log.warning("balance=always: a group of one rank has nothing to balance; it goes on without")

    def place(self, placement: Placement, node_of: np.ndarray | None) -> None:
        """Take on a placement."""
        self.placement = placement
        nodes = [0] * self.group.size if node_of is None else np.asarray(node_of).tolist()
        self.nodes = Topology.of_nodes(nodes)
        self._rules.clear()

    def regroup(self, topology: Topology | None) -> None:
        """Other ranks, joined by these links: costs are measured again, and balance is on."""
        self.topology, self._costs, self.active = topology, None, True
        self._rules.clear()

    def assume(self, seconds_per_pair: float, bandwidth: float, min_pairs: int = 0) -> None:
        """Plan with these costs instead of measured ones: seconds of a pair's forward, bytes/s between ranks."""
        self._costs, self._min_pairs = (np.full(self.group.size, seconds_per_pair), bandwidth), min_pairs
        self._rules.clear()

    def words(self) -> str:
        """What balance costs here and from when on it pays; empty before the first pass."""
        if self.mode == "off" or self._costs is None or not self._rules:
            return ""
        rules = next(iter(self._rules.values()))
        if rules is None or not rules.guest_slots:
            return "balance inside the step: no guests"
        off = rules.expert_seconds[rules.fast & ~np.eye(len(rules.fast), dtype=bool)]
        if not len(off):
            return "balance inside the step: no rank has a fast link to another"
        pair, guest = float(rules.seconds_per_pair.mean()), float(off.mean())
        return (
            f"balance inside the step: a token at an expert takes {pair * 1e6:.1f} us, a guest {guest * 1e3:.2f} ms: "
            f"it pays from {int(np.ceil(guest / pair))} tokens on; at most {rules.guest_slots} guests a layer and rank"
        )

    def rules(self, layer: int, weights: list[torch.Tensor], hidden: torch.Tensor, training: bool) -> StepRules | None:
        """The rules of a layer whose per-expert parameters are `weights`; None: no balance (collective at first)."""
        if self.mode == "off" or not self.active or self.group.size == 1:
            return None
        if (layer, training) not in self._rules:
            self._rules[layer, training] = self._make(layer, weights, hidden, training)
        return self._rules[layer, training]

    def plan(self, everyone: np.ndarray, rules: StepRules, count: bool) -> StepPlan:
        """The plan for the counts of all ranks [R, E]; `count`: it belongs to the figures of `done`."""
        fair = everyone.sum() / self.group.size
        plan = balance_step(everyone, rules, cap=max(int(np.ceil(self.most * fair)), 1))
        if count:
            done, mean = self.done, max(fair, 1e-9)
            done.layers += 1
            done.before, done.after = done.before + plan.before, done.after + plan.after
            done.guests += len(plan.guests)
            done.guest_bytes += len(plan.guests) * self._bytes
            done.saved_seconds += plan.saved_seconds
            done.moved_pairs += (plan.before - plan.after) * mean
        return plan

    def slots_to_keep(self) -> int:
        """Guests of a rank that there is room for in every layer at once."""
        return self.guest_mb * 2**20 // max(self._bytes * self.layers, 1)

    def _make(self, layer: int, weights: list[torch.Tensor], hidden: torch.Tensor, training: bool) -> StepRules | None:
        if self._costs is None:
            self._costs = self._measure(weights, hidden)
        seconds, bandwidth = self._costs
        size = sum(w[0].numel() * w.element_size() if len(w) else 0 for w in weights)
        size = self._bytes = int(_largest(self.group, size))
        budget = self.guest_mb * 2**20
        self.keep = budget // (size * self.layers) >= min(4, max(1, self.placement.num_experts // self.group.size))
        slots = budget // (size * self.layers) if self.keep and training else budget // size
        if not slots and not self._told:
            self._told = True
            log.warning(
                "balance.guest_mb=%d is less than one expert (%.1f MB): no rank takes guests; allowed is more",
                self.guest_mb, size / 2**20,
            )  # fmt: skip
        topology = self.topology
        if topology is None:
            near = self.nodes.node_of[:, None] == self.nodes.node_of[None]
            topology = Topology(
                np.where(near, bandwidth, np.inf), np.where(near, 1e-4, 0.0), self.nodes.node_of
            )  # between nodes unmeasured: step.py is careful there
        else:  # inside nodes no faster than in the trial, where all ranks send at once
            near = topology.node_of[:, None] == topology.node_of[None]
            topology = replace(
                topology, bandwidth=np.where(near, np.minimum(topology.bandwidth, bandwidth), topology.bandwidth)
            )
        hidden_bytes = hidden.shape[1] * hidden.element_size()
        times = 3.0 if training else 1.0  # backward has twice the GEMMs of forward
        rules = StepRules.of(self.placement, layer, topology, size, times * seconds, hidden_bytes, slots, training)
        if self.mode == "always" and rules.fast.sum() == self.group.size and not self._told:
            self._told = True
            log.warning("balance=always: no two ranks share a node and no link was measured fast; it goes on without")
        return rules if self._min_pairs is None else replace(rules, min_pairs=self._min_pairs)

    @torch.no_grad()
    def _measure(self, weights: list[torch.Tensor], hidden: torch.Tensor) -> tuple[np.ndarray, float]:
        """Seconds of a pair's forward on each rank [R], bytes/s inside a node, equal on all ranks (collective)."""
        matrices = [w for w in weights if w.dim() == 3]
        blocks = [w[0] if len(w) else w.new_zeros(w.shape[1:]) for w in matrices]
        seconds = self._of_pair(blocks, hidden)
        message = torch.cat([b.reshape(-1) for b in blocks])
        least = _TRIAL_BYTES if hidden.device.type == "cpu" else _TRIAL_BYTES_CUDA
        message = message.repeat(-(-least // max(message.numel() * message.element_size(), 1)))
        received = torch.empty_like(message)
        give, take = [0] * self.group.size, [0] * self.group.size
        mates = np.flatnonzero(self.nodes.node_of == self.nodes.node_of[self.group.rank])
        place = int(np.flatnonzero(mates == self.group.rank)[0])
        alone = len(mates) == 1
        give[mates[(place + 1) % len(mates)]] = take[mates[place - 1]] = 0 if alone else len(message)
        travel = np.inf
        for _ in range(3):
            self.group.barrier()
            start = time.perf_counter()
            self.group.all_to_all(received[: sum(take)], message[: sum(give)], take, give)
            _synchronise(hidden)
            travel = min(travel, time.perf_counter() - start)
        there = np.inf if alone else message.numel() * message.element_size() / travel
        speed = torch.tensor(there, dtype=torch.float64)
        return seconds, float(self.group.all_gather(speed).median())

    def _of_pair(self, blocks: list[torch.Tensor], hidden: torch.Tensor) -> np.ndarray:
        """Seconds of a pair's forward on each rank [R]; one number where it may be the same hardware (collective).

        What differs then is noise, which must not move tokens; a rank that looks slow is given more chances.
        """
        rows = _TRIAL_ROWS if hidden.device.type == "cpu" else _TRIAL_ROWS_CUDA
        inputs = [hidden.new_ones(rows, block.shape[1]) for block in blocks]
        took = np.full(self.group.size, np.inf)
        for _ in range(_TRIALS):
            mine = np.inf
            for _ in range(5):
                self.group.barrier()
                _synchronise(hidden)
                start = time.perf_counter()
                for x, block in zip(inputs, blocks, strict=True):
                    x @ block.t()
                _synchronise(hidden)
                mine = min(mine, (time.perf_counter() - start) / rows)
            every = self.group.all_gather(torch.tensor(mine, dtype=torch.float64))
            took = np.minimum(took, every.cpu().numpy())
            if took.max() < _SAME_SPEED * took.min():
                return np.full(self.group.size, np.median(took))
        return took


def _largest(group: Group, number: float) -> float:
    value = torch.tensor([float(number)], dtype=torch.float64)
    group.all_reduce(value, "max")
    return float(value)


def _synchronise(like: torch.Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)


__all__ = ["MODES", "Balance", "Balancer", "Limits", "warm"]
