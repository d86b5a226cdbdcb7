"""Routing statistics counted on the rank in the forward: load, co-activation, transitions, a reservoir of expert sets.

Torch, on the device of the model, fetched by `statistics` alone (GPUs: not run yet); the sums become
`ray_ep.placement.RoutingStatistics`. L layers, E experts, T tokens, K top_k.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ray_ep.moe.passes import recomputing
from ray_ep.moe.upload import upload
from ray_ep.placement import RoutingStatistics

_EAGER = ("seconds", "seen", "_passes", "_previous", "_kept")
"""What a step changes at once, beside its load and the generator."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is counted of one layer in one pass."""

    layer: int
    load: torch.Tensor  # [E]
    part: torch.Tensor  # [n, K] choices of the tokens that are looked at for pairs
    scale: float  # tokens of the pass for each of them
    previous: torch.Tensor | None  # [n, K] choices of the same tokens in the layer before
    kept: torch.Tensor | None  # int32 [m, K] choices that go into the reservoir
    places: torch.Tensor | None  # [m] and where


class Counters:
    """Counts of one rank over all its MoE layers.

    Between `begin_step` and `take_step` what is seen is kept apart, a few KB a layer and pass, and then counted: a step
    that is broken off is dropped, and leaves no trace.

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
        self._enabled = True
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
        self._apart: list[Seen] | None = None  # of the step that was begun
        self._before: dict[str, Any] = {}  # what the step has changed already, as it was

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
        if self._enabled and not recomputing():
            self.step[layer] += load
            seen = self._look(layer, index, load)
            self._add(seen) if self._apart is None else self._apart.append(seen)
        self.seconds += time.perf_counter() - start
        return load

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside: nothing is counted."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def begin_step(self) -> None:
        """From now on what is seen is kept apart."""
        assert self._apart is None, "a step was begun that was neither taken nor dropped"
        self._apart = []
        self._before = {name: getattr(self, name) for name in _EAGER} | {"step": self.step.clone()}
        self._before["_rng"] = self._rng.bit_generator.state

    def share(self, before: int, ranks: int) -> None:
        """Keep this rank's part of a sample that `before` ranks shared and now `ranks` do; the window likewise."""
        assert self._apart is None, "a half step was neither taken nor dropped"
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
        """[L, E] load since the last call, on the device; what was kept apart counts from now on."""
        start = time.perf_counter()
        for seen in self._apart or ():
            self._add(seen)
        self._apart, self._before = None, {}
        load, self.step = self.step, torch.zeros_like(self.step)
        self.seconds += time.perf_counter() - start
        return load

    def drop_step(self) -> None:
        """All is as it was at `begin_step`."""
        assert self._apart is not None, "no step was begun"
        self._rng.bit_generator.state = self._before.pop("_rng")
        for name, value in self._before.items():
            setattr(self, name, value)
        self._apart, self._before = None, {}

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

    def _look(self, layer: int, index: torch.Tensor, load: torch.Tensor) -> Seen:
        """What is to be counted of choices [T, K]; small, and no view of them where they are subsampled."""
        stride = max(1, -(-len(index) // self.pair_tokens))
        if layer == 0:
            self._passes += 1
        part = index[self._passes % stride :: stride]  # tokens of all sequences, others in each pass
        part = part.clone() if stride > 1 else part
        follows = layer and self._previous is not None and len(self._previous) == len(part)
        previous, self._previous = self._previous if follows else None, part
        kept, places = self._keep(layer, index) if self.capacity else (None, None)
        return Seen(layer, load, part, len(index) / max(len(part), 1), previous, kept, places)

    def _add(self, seen: Seen) -> None:
        """Count it."""
        layer, part = seen.layer, seen.part
        self.total[layer] += seen.load
        if seen.previous is not None:
            self.transitions[layer - 1] += seen.scale * self._pairs(seen.previous, part)
        self.coactivation[layer] += seen.scale * self._pairs(part, part)
        if seen.kept is not None:
            if self.sample is None:
                shape = (self.layers, self.capacity, seen.kept.shape[1])
                self.sample = torch.zeros(shape, dtype=torch.int32, device=part.device)
            self.sample[layer][seen.places] = seen.kept

    def _pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[E * E] how often each (expert of a, expert of b) met in one token."""
        pairs = a[:, :, None] * self.experts + b[:, None, :]
        return bincount(pairs.reshape(-1), self.experts * self.experts)

    def _keep(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Choices of index [T, K] that go into the reservoir, and where; None: the pass has other tokens here.

        Reservoir sampling (Vitter's algorithm R): the first layer chooses the tokens, the others follow.

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
            return None, None
        tokens, places = upload(np.stack(self._kept), index.device)
        return index[tokens].to(torch.int32), places


def bincount(values: torch.Tensor, length: int) -> torch.Tensor:
    """How often each of 0 ... length - 1 occurs: int64 [length]; torch's own makes the host wait for a GPU."""
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=length)
    return torch.zeros(length, dtype=torch.int64, device=values.device).scatter_add_(0, values, torch.ones_like(values))
