"""The slots of one MoE layer on one rank: which experts are here, and which rank serves an expert of another.

Maps of a placement, derived in one place; no weights. E experts, S experts held (each once: slots that repeat an expert
stay empty), R ranks, C choices of a token among replicas (token t takes column t % C).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from ray_ep.moe.exchange.ways import gateways
from ray_ep.placement import Placement


class Slots:
    """A placement's maps of one layer, seen from one rank.

    Attributes:
        experts: expert in each row of the weights; the first `owned` rows are primaries.
        held: S.
        row_of: [E] row of the local weights, -1 if not here; row_of32 the same for the CPU's kernels.
        routes: [E, C] the rank that serves an expert for this rank's tokens; routes32 the same for the kernels.
        gateways: [E, C] the rank that stands on its node for this one (ways.py).
    """

    def __init__(self, placement: Placement, layer: int, rank: int, node_of: np.ndarray | None, device: torch.device):
        self.experts = placement.experts_of(layer, rank)
        self.held = len(self.experts)
        self.owned = sum(bool(placement.owner[layer, e] == rank) for e in self.experts)
        row_of = torch.full((placement.num_experts,), -1)
        row_of[self.experts] = torch.arange(self.held)
        self.row_of, self.row_of32 = row_of.to(device), row_of.numpy()
        routes = placement.routes(layer, rank, node_of)
        self.routes, self.routes32 = torch.from_numpy(routes).to(device), routes.astype(np.int32)
        nodes = np.zeros(placement.num_ranks, np.int64) if node_of is None else np.asarray(node_of)
        self.gateways = torch.from_numpy(gateways(routes, nodes, rank)).to(device)
        self._ranks = placement.num_ranks
        self._routes_of = functools.cache(lambda source: placement.routes(layer, source, node_of).astype(np.int32))
        self._width = placement.slots.shape[2]
        self._experts_on = functools.partial(placement.experts_of, layer)

    def routes_of(self, source: int) -> np.ndarray:
        """[E, C] int32: the rank that serves an expert for tokens of `source`."""
        routes: np.ndarray = self._routes_of(source)
        return routes

    def all_routes(self) -> torch.Tensor:
        """[R, E, C] the rank that serves an expert for tokens of each source, made anew."""
        every = np.stack([self.routes_of(source) for source in range(self._ranks)])
        return torch.from_numpy(every).to(self.row_of.device).long()

    def served_by(self, index: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """[T, K] the rank for each choice of index [T, K] under `routes` [E, C]; that of a -1 means nothing."""
        column = torch.arange(len(index), device=index.device) % routes.shape[1]
        return routes[index.clamp_min(0), column[:, None]]

    def numbered(self) -> tuple[torch.Tensor, int]:
        """[E, C] int64 number over all ranks of the slot that serves an expert for this rank's tokens; slots of a rank.

        Rank r's slots are r * S and up to S, in the order of its rows of weights, S the most that any rank has.
        """
        row_on = torch.zeros(self._ranks, len(self.routes), dtype=torch.int64)
        for to in range(self._ranks):
            found = self._experts_on(to)
            row_on[to, found] = torch.arange(len(found))
        expert = torch.arange(len(self.routes), device=self.routes.device)[:, None]
        return self.routes * self._width + row_on.to(self.routes.device)[self.routes, expert], self._width
