"""What a rank owns at one step, as bytes: copied between two steps, sent to a keeper, read by whoever owns it next.

Where what lies follows from the placement, so that a message needs no description. No group here (sending.py).
L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch

from ray_ep.moe import ExpertParallel, Rows
from ray_ep.placement import Placement
from ray_ep.rank.step.optimizer import MasterOptimizer

_ALIGN = 64
"""Bytes. Each tensor begins at a multiple of this, a line of the cache."""

COUNTED = ("total", "coactivation", "transitions")
"""Sums of routing statistics that a rank alone has."""


@dataclass(frozen=True, slots=True)
class Key:
    """Which snapshot: of the state after `step` steps, taken by the members of `epoch`."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor lies in a copy."""

    start: int  # byte
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, a view of data uint8 [bytes]."""
        size = prod(self.shape) * self.dtype.itemsize
        return data[self.start : self.start + size].view(self.dtype).view(self.shape)


class Layout:
    """Where everything lies in the copy of what one rank owns under a placement.

    Args:
        optimizer: for how many tensors owners keep of an expert by now.

    Attributes:
        experts: owned ones of each layer, in order. size: bytes.
    """

    def __init__(self, ep: ExpertParallel, optimizer: MasterOptimizer, placement: Placement, rank: int):
        self.rank, self.size = rank, 0
        self.rows: dict[tuple[int, str], Span] = {}  # [owned, kinds, ...] by layer and parameter
        self.counted: dict[str, Span] = {}
        self.experts = [
            [e for e in placement.experts_of(i, rank) if placement.owner[i, e] == rank] for i in range(len(ep.layers))
        ]
        for i, owned in enumerate(self.experts):
            kinds = optimizer.kinds_of(i)
            for name, p in ep.parameters(i).items():
                self.rows[i, name] = self._next((len(owned), kinds.get(name, 1), *p.shape[1:]), torch.float32)
        for name in COUNTED:
            counted: torch.Tensor = getattr(ep.counters, name)
            self.counted[name] = self._next(tuple(counted.shape), counted.dtype)

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Span:
        span = Span(self.size, shape, dtype)
        self.size += -(-prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        return span


class OwnedCopy:
    """Copy of what one rank owned, in one piece of memory of the host.

    Args:
        data: uint8 [layout.size], which may be written already.
    """

    def __init__(self, key: Key, layout: Layout, data: torch.Tensor):
        self.key, self.layout, self.data = key, layout, data

    @torch.no_grad()
    def take(self, ep: ExpertParallel, optimizer: MasterOptimizer) -> None:
        """Copy what this process's rank owns now (between steps)."""
        stacks = {(w.layer, w.key): w for w in optimizer.weights if w.layer is not None}
        for (layer, name), span in self.layout.rows.items():
            rows, weight = span.of(self.data), stacks.get((layer, name))
            if weight is None:  # frozen: it has no master
                rows[:, 0].copy_(ep.parameters(layer)[name].data[: len(rows)])
                continue
            for kind, tensor in enumerate((weight.master.data, *weight.moments.values())):
                rows[:, kind].copy_(tensor)
        for name, span in self.layout.counted.items():
            span.of(self.data).copy_(getattr(ep.counters, name))

    def rows_of(self, layer: int, expert: int) -> Rows:
        """Rows [kinds, ...] of an expert that was owned, as `ray_ep.moe.regroup` takes them."""
        row = self.layout.experts[layer].index(expert)
        return {name: span.of(self.data)[row] for (i, name), span in self.layout.rows.items() if i == layer}

    def tensors(self, layer: int, optimizer: MasterOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
        """What was owned of a layer, by the keys of a checkpoint; of frozen weights there are no moments."""
        for weight in optimizer.parameters:
            if weight.layer == layer:
                rows = self.layout.rows[layer, weight.key].of(self.data)
                for expert, row in zip(self.layout.experts[layer], rows, strict=True):
                    for kind, tensor in zip(("weight", *optimizer.kinds), row, strict=False):  # moments may be none yet
                        yield f"{kind}/{weight.name}/{expert}", tensor

    def counted(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and sums of the routing statistics."""
        return ((name, span.of(self.data)) for name, span in self.layout.counted.items())


class DenseCopy:
    """Copy in the host's memory of what every rank has: dense masters and moments, buffers, the number of updates."""

    def __init__(self, model: torch.nn.Module, optimizer: MasterOptimizer):
        self.updates = optimizer.updates
        self.weights = [
            (w, _copy(w.master.data), {k: _copy(m) for k, m in w.moments.items()})
            for w in optimizer.weights
            if w.layer is None
        ]
        self.frozen = [(w.name, w.param.data) for w in optimizer.frozen if w.layer is None]  # they never change
        self.buffers = [(name, b, _copy(b)) for name, b in model.named_buffers()]

    @torch.no_grad()
    def put_back(self, optimizer: MasterOptimizer) -> None:
        """All of it is as it was; what the model computes with, too."""
        optimizer.updates = self.updates
        for w, master, moments in self.weights:
            w.master.data.copy_(master)
            w.moments = {kind: moment.to(w.master.device, copy=True) for kind, moment in moments.items()}
            if w.compute is not None:
                w.compute.copy_(w.master)
        for _, buffer, then in self.buffers:
            buffer.copy_(then)

    def tensors(self, persistent: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """All of it by the keys of a checkpoint, which holds these buffers alone."""
        for weight, master, moments in self.weights:
            yield f"weight/{weight.name}", master
            yield from ((f"{kind}/{weight.name}", moment) for kind, moment in moments.items())
        yield from ((f"weight/{name}", data.float()) for name, data in self.frozen)
        yield from ((f"buffer/{name}", then) for name, _, then in self.buffers if name in persistent)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
