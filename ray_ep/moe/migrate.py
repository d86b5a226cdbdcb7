"""Experts move: from the placement that a model has to another, over its group, between steps.

Which rows travel, and in which rounds, is computed in ray_ep.placement.migration, the same on every rank. What arrives
waits beside the model; only when all of it is there on every rank do the layers change, one after the other.
L MoE layers, E experts, R ranks, S experts held by a rank before, S' after.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, prod
from typing import Any, Protocol

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.errors import BadInput, ModelError, PlacementError
from ray_ep.moe.parallelize import ExpertParallel
from ray_ep.placement import Move, Placement, moves
from ray_ep.placement.migration import MovePart, move_rounds

MIB = 1 << 20
"""Bytes of a mebibyte."""

Rows = dict[str, torch.Tensor]
"""What travels of one expert, by parameter: its row [...], or what its owner keeps of it, float32 [kinds, ...]."""


class OwnedState(Protocol):
    """What primaries keep beside compute weights, as `apply_placement` moves it: MasterOptimizer is one.

    All of it is float32 and shaped like the parameter's row; the first kind is the master weight, whose rounding to the
    parameter's dtype is the compute weight.
    """

    def pending(self) -> str:
        """Name of a parameter whose gradient waits for an update; empty if there is none."""

    def kinds_of(self, layer: int) -> dict[str, int]:
        """Tensors that are kept of an expert, by name of the parameter in the experts module; equal on all ranks."""

    def rows(self, layer: int, expert: int) -> dict[str, list[torch.Tensor]]:
        """What is kept of an expert that this rank owns, as `kinds_of` counts it; not written to."""

    def take(self, layer: int, experts: list[int], arrived: dict[int, Rows]) -> None:
        """Own `experts` from now on, in that order: rows [kinds, ...] of those that this rank did not own `arrived`.
        Of one that it did own they are in place of its own.

        Called with the parameters new and the layer's lists still old.
        """


@dataclass(frozen=True, slots=True)
class Moved:
    """What `apply_placement` did.

    Args:
        moves: between all ranks. rounds: exchanges that they took.
        sent, received: bytes of this rank.
        seconds: by this rank's clock, waiting for peers included.
    """

    moves: int
    rounds: int
    sent: int
    received: int
    seconds: float


@torch.no_grad()
def apply_placement(
    model: Any,
    placement: Placement,
    *,
    node_of: np.ndarray | None = None,
    buffer_mb: float = 256,
    state: OwnedState | None = None,
) -> Moved:
    """Move experts so that a parallelized model has another placement (collective, between steps).

    Every rank of the model's group calls it with equal arguments. Experts that stay on their rank cross no link. The
    model's parameters stay the same `nn.Parameter` objects, frozen or not, with other rows: a torch optimizer that has
    kept anything per row must be told, through `state`.

    After an error nothing has changed: the model computes with its old placement, over another group where the group
    failed. One moment is beyond that: a group that dies in the very last agreement may leave some ranks with the new
    placement; `model.ray_ep.placement.version` tells which, and the next call refuses to go on from there.

    Beside the model, memory is needed for the experts that arrive and twice `buffer_mb`, which is taken before anything
    moves, and for one layer at a time in the end: a rank that has no room for that raises torch's error and is lost.

    Args:
        node_of: [R] node of each rank; None: as it was.
        buffer_mb: MiB that a rank sends and receives at most in one exchange.
        state: what travels with primaries, such as masters and moments; None: nothing does.

    Raises:
        PlacementError: the placement does not fit layers, experts or ranks, the ranks were given different ones, or a
            rank refuses. ModelError: not parallelized, or gradients are present. GroupError: a peer is gone.
    """
    began = time.perf_counter()
    ep: ExpertParallel | None = getattr(model, "ray_ep", None)
    if ep is None:
        raise ModelError(f"{type(model).__name__} is not parallelized: call ray_ep.moe.parallelize first")
    device = next(model.parameters()).device
    node_of = ep.node_of if node_of is None else np.asarray(node_of)
    shipment, problem = None, _problem(ep, placement, node_of, buffer_mb, state)
    if problem is None:
        try:
            shipment = Shipment(ep, placement, node_of, int(buffer_mb * MIB), state, device)
        except (MemoryError, torch.OutOfMemoryError) as e:
            problem = PlacementError(f"rank {ep.group.rank} has no memory for the experts that arrive: {e}")
    agree(ep.group, _digest(ep, placement, node_of, buffer_mb, state), problem, device)
    assert shipment is not None
    sent = received = 0
    for parts in shipment.rounds:
        out, into = shipment.exchange(ep.group, parts)
        sent, received = sent + out, received + into
    agree(ep.group, 0, None, device)  # the last word: now everybody has everything
    for index in range(len(ep.layers)):
        shipment.swap(index)
    ep.place(placement, node_of, device)
    return Moved(len(shipment.moves), len(shipment.rounds), sent, received, time.perf_counter() - began)


class Shipment:
    """The rows that a change of placement moves, from one rank's side, and where arriving ones wait.

    Attributes:
        moves: of all ranks. rounds: exchanges of parts of them.
    """

    def __init__(
        self,
        ep: ExpertParallel,
        placement: Placement,
        node_of: np.ndarray | None,
        buffer_bytes: int,
        state: OwnedState | None,
        device: torch.device,
    ):
        self.ep, self.placement, self.state = ep, placement, state
        nodes = np.zeros(ep.group.size) if node_of is None else node_of
        self.kinds = [state.kinds_of(i) if state else {} for i in range(len(ep.layers))]
        self.moves = moves(ep.placement, placement, nodes[:, None] != nodes[None])
        payload = [sum(prod(s) * d.itemsize for s, d in self._payload(m).values()) for m in self.moves]
        self.rounds = move_rounds(self.moves, payload, ep.group.size, buffer_bytes)
        self.arriving: dict[int, Rows] = {}  # by number of the move
        for i, m in enumerate(self.moves):
            if m.target == ep.group.rank:
                like = ep.parameters(m.layer)
                self.arriving[i] = {
                    n: torch.empty(s, dtype=d, device=like[n].device) for n, (s, d) in self._payload(m).items()
                }
        # One send and one receive buffer for all rounds: no round allocates, so none fails for want of memory.
        sizes = [self._sizes(parts) for parts in self.rounds]
        most_out, most_in = (max((sum(s[side]) for s in sizes), default=0) for side in (0, 1))
        self._out = torch.empty(most_out, dtype=torch.uint8, device=device)
        self._into = torch.empty(most_in, dtype=torch.uint8, device=device)

    def exchange(self, group: Group, parts: list[MovePart]) -> tuple[int, int]:
        """One round (collective); returns bytes sent and received by this rank."""
        (going, coming), (sizes_out, sizes_in) = self._sides(parts), self._sizes(parts)
        out, into = self._out[: sum(sizes_out)], self._into[: sum(sizes_in)]
        _copy(_pieces(out), (x for side in going for p in side for x in self._outgoing(p)))
        group.all_to_all(into, out, sizes_in, sizes_out)
        group.wait()
        _copy((x for side in coming for p in side for x in self._incoming(p)), _pieces(into))
        return len(out), len(into)

    def swap(self, index: int) -> None:
        """Give a layer its new rows (not collective), those that have arrived among them."""
        here = [i for i in self.arriving if self.moves[i].layer == index]
        arrived = {self.moves[i].expert: (self.moves[i], self.arriving.pop(i)) for i in here}
        kept = {e: rows for e, (m, rows) in arrived.items() if m.state}
        weights = {e: rows for e, (m, rows) in arrived.items() if m.weights}
        for e in kept.keys() & weights.keys():  # with a master the compute weight does not travel
            weights[e] = {n: r[0] if n in self.kinds[index] else r for n, r in kept[e].items()}
        swap_rows(self.ep, index, self.placement, weights, kept, self.state)

    def _sides(self, parts: list[MovePart]) -> tuple[list[list[MovePart]], list[list[MovePart]]]:
        """Parts of a round that this rank sends to each rank, and gets from each; both ends have them in one order."""
        rank, size = self.ep.group.rank, self.ep.group.size
        going: list[list[MovePart]] = [[] for _ in range(size)]
        coming: list[list[MovePart]] = [[] for _ in range(size)]
        for part in parts:
            move = self.moves[part.move]
            if move.source == rank:
                going[move.target].append(part)
            elif move.target == rank:
                coming[move.source].append(part)
        return going, coming

    def _sizes(self, parts: list[MovePart]) -> tuple[list[int], list[int]]:
        """Bytes of a round that go to each rank, and come from each."""
        going, coming = ([sum(p.stop - p.start for p in x) for x in side] for side in self._sides(parts))
        return going, coming

    def _payload(self, move: Move) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what travels, by parameter: with a master the compute weight need not."""
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, p in self.ep.parameters(move.layer).items():
            kinds = self.kinds[move.layer].get(name, 0)
            if move.state and kinds:
                out[name] = (kinds, *p.shape[1:]), torch.float32
            elif move.weights:
                out[name] = tuple(p.shape[1:]), p.dtype
        return out

    def _outgoing(self, part: MovePart) -> Iterator[torch.Tensor]:
        move = self.moves[part.move]
        kept = self.state.rows(move.layer, move.expert) if self.state and move.state else {}
        row, parameters = self.ep.layers[move.layer].experts.index(move.expert), self.ep.parameters(move.layer)
        tensors = [t for n in self._payload(move) for t in kept.get(n) or [parameters[n].data[row]]]
        return _pieces(*tensors, start=part.start, stop=part.stop)

    def _incoming(self, part: MovePart) -> Iterator[torch.Tensor]:
        return _pieces(*self.arriving[part.move].values(), start=part.start, stop=part.stop)


def swap_rows(
    ep: ExpertParallel,
    index: int,
    placement: Placement,
    weights: Mapping[int, Rows],
    kept: Mapping[int, Rows],
    state: OwnedState | None,
) -> None:
    """Give a layer the rows of a placement for this rank: parameters [S', ...], then what its primaries keep.

    Not collective; the layer's lists are still the old ones afterwards.

    Args:
        weights: rows of experts that are not here yet.
        kept: rows [kinds, ...] of those that this rank has not owned yet.
    """
    layer, rank = ep.layers[index], ep.group.rank
    experts = placement.experts_of(index, rank)
    owned = [e for e in experts if placement.owner[index, e] == rank]
    layer.forget()
    if experts == layer.experts and len(owned) == layer.owned and not kept:
        return
    row_of = {e: row for row, e in enumerate(layer.experts)}
    for name, p in ep.parameters(index).items():
        fresh = p.data.new_empty(len(experts), *p.shape[1:])
        for row, e in enumerate(experts):
            fresh[row] = weights[e][name] if e in weights else p.data[row_of[e]]
        _replace(p, fresh)
    if state is not None:
        state.take(index, owned, dict(kept))
    module: Any = ep.modules[index]
    module.num_experts, module.ray_ep_rows = len(experts), list(experts)


def _pieces(*tensors: torch.Tensor, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """Bytes start to stop of tensors laid end to end, one [n] uint8 view a tensor."""
    at = 0
    for t in tensors:
        low, high = max(start - at, 0), t.nbytes if stop is None else min(stop - at, t.nbytes)
        if low < high:
            yield t.contiguous().reshape(-1).view(torch.uint8)[low:high]
        at += t.nbytes


def _copy(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    """Copy bytes from one row of pieces to another of the same length, however each is cut."""
    target = torch.empty(0)
    rest = iter(targets)
    for source in sources:
        while len(source):
            target = target if len(target) else next(rest)
            n = min(len(source), len(target))
            target[:n].copy_(source[:n])
            source, target = source[n:], target[n:]


def _replace(p: torch.nn.Parameter, data: torch.Tensor) -> None:
    """Other rows for a parameter that stays the same object.

    A graph that somebody keeps holds the parameter's gradient accumulator, which insists on the old shape; torch makes
    a new one only when the dtype changes.
    """
    p.data = p.data.new_empty(0, dtype=torch.float64 if p.dtype != torch.float64 else torch.float32)
    p.data = data


def _problem(
    ep: ExpertParallel, placement: Placement, node_of: np.ndarray | None, buffer_mb: float, state: OwnedState | None
) -> BadInput | None:
    """Why this rank cannot move to the placement now."""
    have = (len(ep.layers), ep.num_experts, ep.group.size)
    want = (placement.num_layers, placement.num_experts, placement.num_ranks)
    if want != have:
        return PlacementError(
            f"placement is for {want[0]} layers x {want[1]} experts on {want[2]} ranks; the model has {have[0]} MoE "
            f"layers x {have[1]} experts and the group {have[2]} ranks"
        )
    if node_of is not None and node_of.shape != (ep.group.size,):
        return PlacementError(f"node_of has shape {node_of.shape}: expected [{ep.group.size}], one node a rank")
    if not 1 <= buffer_mb * MIB < inf:
        return PlacementError(f"buffer_mb={buffer_mb}: expected a positive number of MiB")
    if name := unapplied(ep, state):
        return ModelError(
            f"gradients are present ({name}): experts move between steps; apply or clear them first "
            "(optimizer.step, then zero_grad)"
        )
    return None


def unapplied(ep: ExpertParallel, state: OwnedState | None) -> str:
    """Name of a parameter with a gradient, among those of experts and what waits in `state`; empty if there is none."""
    waiting = (f"{n}.{k}" for i, n in enumerate(ep.names) for k, p in ep.parameters(i).items() if p.grad is not None)
    return next(waiting, "").lstrip(".") or (state.pending() if state else "")


def _digest(
    ep: ExpertParallel, placement: Placement, node_of: np.ndarray | None, buffer_mb: float, state: OwnedState | None
) -> int:
    """A number of everything that must be equal on all ranks: from where, to where, and how."""
    kinds = [sorted(state.kinds_of(i).items()) for i in range(len(ep.layers))] if state else None
    nodes = None if node_of is None else node_of.tolist()
    text = repr((ep.placement.to_json(), placement.to_json(), nodes, float(buffer_mb), kinds))
    return zlib.crc32(text.encode())


def agree(group: Group, digest: int, problem: BadInput | None, device: torch.device) -> None:
    """Raise on every rank if one has a problem, or they differ (collective)."""
    mine = torch.tensor([problem is not None, digest], dtype=torch.int64, device=device)
    everyone = group.all_gather(mine)
    group.wait()
    if problem is not None:
        raise problem
    refusing, digests = zip(*everyone.tolist(), strict=True)
    if any(refusing):
        raise PlacementError(f"rank {refusing.index(1)} refuses the placement (its own error says why): nothing moved")
    if len(set(digests)) > 1:
        other = next(r for r, d in enumerate(digests) if d != digests[0])
        raise PlacementError(
            f"ranks 0 and {other} were given different placements (or nodes, buffers, states), or have different ones "
            "now: nothing moved"
        )
