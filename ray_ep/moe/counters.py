"""Routing statistics counted on the rank in the forward: load, co-activation, transitions, a reservoir of expert sets.

Torch, on the device of the model, fetched by `statistics` alone (GPUs: not run yet); the sums become
`ray_ep.placement.RoutingStatistics`. L layers, E experts, T tokens, K top_k.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from ray_ep.moe.passes import recomputing
from ray_ep.placement import RoutingStatistics


class Counters:
    """Counts of one rank over all its MoE layers.

    Args:
        sample: tokens kept in the reservoir of expert sets; 0 for none.
        window: mean age, in tokens, of those kept once that many were seen; not given: all count alike, however old.
        seed: of the reservoir's choice; ranks should differ.
        pair_tokens: tokens a layer and pass that are looked at for pair counts; more are subsampled, and the counts
            scaled to the whole by `take`.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        sample: int = 0,
        seed: int = 0,
        pair_tokens: int = 1024,
        window: int = 1 << 62,
    ):
        self.layers, self.experts, self.pair_tokens = layers, experts, pair_tokens
        self.enabled = True
        self.seconds = 0.0  # spent counting so far
        self.total = torch.zeros(layers, experts, dtype=torch.int64)  # since the start
        self.step = torch.zeros(layers, experts, dtype=torch.int64)  # since the last take_step
        self.coactivation = torch.zeros(layers, experts * experts, dtype=torch.float64)
        self.transitions = torch.zeros(max(layers - 1, 0), experts * experts, dtype=torch.float64)
        self.capacity, self._rng = sample, np.random.default_rng(seed)
        self.sample: torch.Tensor | None = None  # [L, capacity, K]
        self.window = window
        self.seen = 0  # tokens offered to the reservoir
        self._passes = 0
        self._previous: torch.Tensor | None = None  # expert ids of the layer before, for transitions
        self._kept: tuple[np.ndarray, np.ndarray] | None = None  # tokens to keep of this pass, and where

    def to(self, device: torch.device) -> None:
        """Go on counting on a device."""
        for name in ("total", "step", "coactivation", "transitions", "sample"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))

    def count(self, layer: int, top_k_index: torch.Tensor) -> torch.Tensor:
        """Count one layer's choices [T, K] (not in a recomputation); returns their load [E]."""
        start = time.perf_counter()
        index = top_k_index.detach()
        load = bincount(index.reshape(-1), self.experts)
        if self.enabled and not recomputing():
            self.total[layer] += load
            self.step[layer] += load
            self._count_pairs(layer, index)
            if self.capacity:
                self._keep(layer, index)
        self.seconds += time.perf_counter() - start
        return load

    def share(self, before: int, ranks: int) -> None:
        """Keep this rank's part of a sample that `before` ranks shared and now `ranks` do; the window likewise."""
        self.window = round(self.window * before / ranks)
        capacity, filled = round(self.capacity * before / ranks), min(self.seen, self.capacity)
        self._kept = None
        if self.sample is not None:
            keep = torch.from_numpy(np.sort(self._rng.permutation(filled)[:capacity])).to(self.sample.device)
            sample = self.sample.new_zeros(self.layers, capacity, self.sample.shape[2])
            sample[:, : len(keep)] = self.sample[:, keep]
            self.sample = sample
        if capacity > self.capacity:  # new places are filled first
            self.seen = filled
        self.capacity = capacity

    def take_step(self) -> torch.Tensor:
        """[L, E] load since the last call, on the device."""
        load, self.step = self.step, torch.zeros_like(self.step)
        return load

    def statistics(self) -> RoutingStatistics:
        """Everything counted so far on this rank."""
        shape = (-1, self.experts, self.experts)
        return RoutingStatistics(
            self.total.cpu().numpy().copy(),
            self.coactivation.cpu().numpy().round().astype(np.int64).reshape(shape),
            self.transitions.cpu().numpy().round().astype(np.int64).reshape(shape),
            self.sets(),
        )

    def sets(self) -> np.ndarray:
        """[L, N, K] int32, the reservoir; N is 0 before the first pass."""
        if self.sample is None:
            return np.zeros((self.layers, 0, 1), np.int32)
        return self.sample[:, : min(self.seen, self.capacity)].cpu().numpy().astype(np.int32)

    def _count_pairs(self, layer: int, index: torch.Tensor) -> None:
        stride = max(1, -(-len(index) // self.pair_tokens))
        if layer == 0:
            self._passes += 1
        part = index[self._passes % stride :: stride]  # tokens of all sequences, others in each pass
        scale = len(index) / max(len(part), 1)
        if layer and self._previous is not None and len(self._previous) == len(part):
            self.transitions[layer - 1] += scale * self._pairs(self._previous, part)
        self.coactivation[layer] += scale * self._pairs(part, part)
        self._previous = part

    def _pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[E * E] how often each (expert of a, expert of b) met in one token."""
        pairs = a[:, :, None] * self.experts + b[:, None, :]
        return bincount(pairs.reshape(-1), self.experts * self.experts)

    def _keep(self, layer: int, index: torch.Tensor) -> None:
        """Reservoir sampling (Vitter's algorithm R): the first layer chooses the tokens, the others follow.

        With a window, every later token is taken as if it were the last one of the window: then the ages of those kept
        are exponential (Aggarwal's biased reservoir, VLDB 2006).
        """
        if layer == 0:
            number = np.minimum(self.seen + np.arange(len(index)), max(self.window, self.capacity))
            slot = np.where(number < self.capacity, number, self._rng.integers(0, number + 1))
            taken = np.nonzero(slot < self.capacity)[0][::-1]
            slot, last = np.unique(slot[taken], return_index=True)  # of tokens that chose one place the last stays
            self._kept = (taken[last], slot)
            self.seen += len(index)
        if self._kept is None or (self._kept[0] >= len(index)).any():
            return
        if self.sample is None:
            shape = (self.layers, self.capacity, index.shape[1])
            self.sample = torch.zeros(shape, dtype=torch.int32, device=index.device)
        tokens, places = (torch.from_numpy(x).to(index.device) for x in self._kept)
        self.sample[layer][places] = index[tokens].to(torch.int32)


def bincount(values: torch.Tensor, length: int) -> torch.Tensor:
    """How often each of 0 ... length - 1 occurs: int64 [length]; torch's own makes the host wait for a GPU."""
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=length)
    return torch.zeros(length, dtype=torch.int64, device=values.device).scatter_add_(0, values, torch.ones_like(values))
