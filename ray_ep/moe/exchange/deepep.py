"""The DeepEP body: tokens travel by DeepEP's kernels, whose experts are this package's slots.

Not run on a GPU yet, nor with the real library (docs/notes/deepep.md). Any placement is slots to the library, replicas
too; it balances nothing inside the step. The library's calls are elastic.py's, the experts grouped.py's. T tokens, K
top_k, H hidden, E experts, R ranks, S slots of a rank, N rows received, P pairs received, C choices among replicas.

    tokens [T, H], slots [T, K] --send--> rows [N, H] --experts, weights--> partial [N, H] --bring back--> out [T, H]
    backward: the gradient goes the same ways with the handle of forward, so send is bring back's, and the other way
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ray_ep.errors import BadInput
from ray_ep.moe.exchange.elastic import Elastic, Room, check_fit
from ray_ep.moe.exchange.grouped import nothing, transformers_experts
from ray_ep.moe.exchange.meter import Meter
from ray_ep.moe.exchange.segments import order_of, starts
from ray_ep.moe.site import Experts, LocalPairs, LocalWeights, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where one rank's tokens go in one pass.

    Args:
        slots: [T, K] over all ranks, -1 for none. num_slots: R * S.
        sent: [R] rows to each rank, on its way to the host: to be read after the send, which waits for the device.
    """

    elastic: Elastic
    slots: torch.Tensor
    num_slots: int
    sent: torch.Tensor
    meter: Meter


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """What came, and how it goes back.

    Args:
        row: [P] ascending. expert_row: [P] of the local weights. pair: [P] flat number in [N, K]. rows: N.
    """

    way: Way
    handle: Any
    row: torch.Tensor
    expert_row: torch.Tensor
    pair: torch.Tensor
    rows: int


class DeepEPBody:
    """The body of all layers over DeepEP.

    Args:
        site: of the layer; `exchange.tokens` is the most tokens of a rank in one pass.
        experts: what computes the pairs that this rank has received; not given: transformers' grouped kernel.

    Raises:
        BadInput: chunks or float8 are asked for.
    """

    def __init__(self, site: Site, experts: Experts | None = None):
        self.site, self.experts = site, experts or transformers_experts
        exchange = site.exchange
        if exchange.chunks > 1 or exchange.float8:
            raise BadInput(
                f"exchange by deepep with chunks={exchange.chunks} and float8={exchange.float8}: allowed are 1, False"
            )
        self.slot_of, self.width = site.slots.numbered()
        self._fits: Room | None = None  # what was found to fit

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`.

        Raises:
            BadInput: more tokens than the bound, or what the library does not carry, the same on every rank.
        """
        site, meter, tokens = self.site, self.site.traffic.meter, len(hidden)
        meter.enter("route")
        way = self._way(hidden, index)
        if not tokens:  # the library's own tests send at least one token; one without choices goes nowhere
            hidden, weights = pad(hidden, (0, 0, 0, 1)), pad(weights, (0, 0, 0, 1))
        meter.enter("pack")
        rows, pair_weights, arrived = _Send.apply(hidden, weights, way)  # type: ignore[no-untyped-call]
        site.count_pairs(len(arrived.row))
        meter.enter("experts")
        local = LocalWeights(dict(module.named_parameters(recurse=False)), {})
        if len(arrived.row):
            first = starts(arrived.row, len(rows))
            pairs = LocalPairs(row=arrived.row, first=first, expert_row=arrived.expert_row, of_guests=0)
            partial = self.experts(module, local, rows, pair_weights, pairs)
        else:
            partial = nothing(local, rows, pair_weights)
        meter.enter("combine")
        out: torch.Tensor = _BringBack.apply(partial, arrived)  # type: ignore[no-untyped-call]
        meter.enter("")
        return out[:tokens]

    def _way(self, hidden: torch.Tensor, index: torch.Tensor) -> Way:
        site, traffic = self.site, self.site.traffic
        room = Room(tokens=site.exchange.tokens, hidden=hidden.shape[1], choices=index.shape[1])
        if room != self._fits:  # a layer has one kind of hidden states, and one body for each
            check_fit(room, traffic.size, self.width, hidden.dtype)
            self._fits = room
        if len(hidden) > room.tokens:
            raise BadInput(
                f"exchange.tokens={room.tokens}: a rank has {len(hidden)} tokens in one pass; allowed is up to the "
                "bound"
            )
        elastic = site.shared.elastics.take(traffic.group, room)
        to = site.slots.served_by(index, site.slots.routes)
        site.note(index, to)
        slots = site.slots.served_by(index, self.slot_of).masked_fill(index < 0, -1)
        visits = torch.zeros(len(to), traffic.size + 1, dtype=torch.uint8, device=to.device)
        visits.scatter_(1, to.masked_fill(index < 0, traffic.size), 1)
        return Way(
            elastic=elastic,
            slots=slots if len(slots) else pad(slots, (0, 0, 0, 1), value=-1),
            num_slots=traffic.size * self.width,
            sent=visits[:, : traffic.size].sum(0, dtype=torch.int64).to("cpu", non_blocking=True),
            meter=traffic.meter,
        )


class _Send(torch.autograd.Function):
    """hidden [T, H], weights [T, K] -> rows [N, H], pair weights [P], Arrived; backward brings their gradients back."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, way: Way) -> Any:
        phase = way.meter.enter("exchange")
        parcels = way.elastic.send(hidden, way.slots, weights, way.num_slots)
        way.meter.enter(phase)
        _count(way, hidden)
        slot = parcels.slot.flatten()  # [N * K]
        # This rank's pairs in the order of rows; how many there are the host knows, so nothing waits.
        pair = order_of(slot < 0, 1)[: parcels.pairs]
        arrived = Arrived(
            way=way,
            handle=parcels.handle,
            row=pair // weights.shape[1],
            expert_row=slot[pair],
            pair=pair,
            rows=len(parcels.rows),
        )
        ctx.arrived, ctx.weights = arrived, (weights.shape, weights.dtype)
        ctx.set_materialize_grads(True)
        return parcels.rows, parcels.weights.flatten()[pair].to(weights.dtype), arrived

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor, d_pair_weights: torch.Tensor, _: None) -> Any:
        arrived: Arrived = ctx.arrived
        way, (shape, dtype) = arrived.way, ctx.weights
        way.meter.enter("combine")
        d_weights = torch.zeros(arrived.rows * shape[1], dtype=torch.float32, device=d_rows.device)
        d_weights[arrived.pair] = d_pair_weights.float()
        way.meter.enter("exchange")
        d_hidden, came = way.elastic.bring_back(d_rows, arrived.handle, d_weights.view(arrived.rows, shape[1]))
        way.meter.enter("")
        assert came is not None
        return d_hidden, came.to(dtype), None


class _BringBack(torch.autograd.Function):
    """partial [N, H], one weighted sum a received row -> out [T, H]; backward sends each token's gradient to them."""

    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, arrived: Arrived) -> torch.Tensor:
        ctx.arrived = arrived
        # See dispatch._Combine: reading it starts a checkpointed block's recomputation. No view: that keeps `partial`.
        ctx.save_for_backward(partial.new_empty(0))
        phase = arrived.way.meter.enter("exchange")
        out, _ = arrived.way.elastic.bring_back(partial, arrived.handle)
        arrived.way.meter.enter(phase)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        arrived: Arrived = ctx.arrived
        arrived.way.meter.enter("exchange")
        d_partial = arrived.way.elastic.send_again(d_out, arrived.handle)
        _count(arrived.way, d_out)
        arrived.way.meter.enter("experts")  # their backward runs from here to the send's
        return d_partial, None


def _count(way: Way, rows: torch.Tensor) -> None:
    """Count the rows [T, H] of one send; the host has waited for the device in it."""
    way.meter.add(way.sent.tolist(), rows, way.elastic.group.rank)
