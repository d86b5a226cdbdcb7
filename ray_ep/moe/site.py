"""Where a body works: one layer of one rank, with what all layers share; what a body is, and its local mathematics.

The bodies themselves are cpu/fused.py and exchange/grouped.py, bounded.py and deepep.py; experts.py chooses among them.
T tokens, K top_k, H hidden, N rows received, P pairs received, S experts held, G guests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ray_ep.moe.balance.balancer import Balancer
from ray_ep.moe.counters import Counters
from ray_ep.moe.cpu.gemm import Gemm
from ray_ep.moe.cpu.pool import Pool
from ray_ep.moe.exchange.elastic import ElasticPool
from ray_ep.moe.exchange.lanes import Lanes
from ray_ep.moe.exchange.meter import MeteredGroup
from ray_ep.moe.exchange.ways import Exchange
from ray_ep.moe.passes import Passes, recomputing
from ray_ep.moe.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all layers of a model share on one rank."""

    traffic: MeteredGroup
    passes: Passes
    counters: Counters
    balancer: Balancer
    pool: Pool
    gemm: Gemm
    elastics: ElasticPool
    lanes: Lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One layer of one rank, as long as placement and exchange stay what they are."""

    index: int  # of the layer
    slots: Slots
    exchange: Exchange
    shared: Shared

    @property
    def traffic(self) -> MeteredGroup:
        """What this layer's exchanges go over."""
        return self.shared.traffic

    def count_pairs(self, pairs: int | torch.Tensor) -> None:
        """Count pairs that this rank computes in this pass (see Meter.count), unless it is a recomputation."""
        if not recomputing():
            self.traffic.meter.count(self.index, pairs)

    @property
    def listened(self) -> bool:
        """Whether somebody wants what `note` says."""
        now = self.shared.passes.now
        return now.trace is not None or now.recorder is not None

    def note(self, index: torch.Tensor, to: torch.Tensor) -> None:
        """In a pass with a trace or a recorder: keep which rank answers for each choice, both [T, K].

        Args:
            index: the very tensor that the body was called with.
        """
        now = self.shared.passes.now
        if now.trace is not None:
            now.trace[self.index].append((index, to.long()))
        if now.recorder is not None:
            now.recorder.answered(index, to)


class Body(Protocol):
    """One layer's mathematics on one rank. All bodies give the same, up to rounding; tests hold that."""

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], index [T, K] (-1: no choice), weights [T, K] -> [T, H].

        Collective, forward and backward: each rank calls it with its tokens, maybe none.

        Args:
            module: the transformers experts module, with this rank's weights.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPairs:
    """The pairs that one rank computes: which row of tokens goes through which row of the weights."""

    row: torch.Tensor  # int64 [P] ascending, below N
    first: torch.Tensor  # int64 [N + 1] the first pair of each row
    expert_row: torch.Tensor  # int64 [P] below S: of the rank's own weights; from S on: S + number of the guest
    of_guests: int  # how many pairs go through guests; the plan of the balance says it, so nothing waits


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """Per-expert parameters of one pass by their names in the module, with graph."""

    own: dict[str, torch.Tensor]  # [S, ...] each
    guests: dict[str, torch.Tensor]  # [G, ...] each, contiguous; empty where this rank has none


class Experts(Protocol):
    """The mathematics between two exchanges, on one rank alone; no host sync. All give the same, up to rounding."""

    def __call__(
        self, module: Any, weights: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor, pairs: LocalPairs
    ) -> torch.Tensor:
        """rows [N, H], pair_weights [P] (both with graph) -> [N, H]: each row's pairs, weighted and added up.

        Never called without pairs.

        Args:
            module: the transformers experts module, for its flags and functions; its parameters are in `weights`.
        """
        ...
