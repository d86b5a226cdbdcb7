"""The grouped body: any layout of experts on any device, between two exchanges.

The exchange is dispatch.py's. What computes in between is passed in: here it is transformers' own grouped kernel.
T tokens, K top_k, H hidden, N rows received, P pairs received, S experts held, G guests.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ray_ep.moe.balance.guests import BorrowedRows, Guests, destinations
from ray_ep.moe.balance.step import counts_of, planned, rules_of
from ray_ep.moe.exchange.dispatch import (
    DispatchPlan,
    ReceivedPairs,
    Sizes,
    Wanted,
    alone,
    combine,
    dispatch,
    plan_dispatch,
    swap,
)  # fmt: skip
from ray_ep.moe.exchange.float8 import Rounded
from ray_ep.moe.exchange.meter import Meter
from ray_ep.moe.exchange.segments import CopyRows, Segments, SumRows, starts
from ray_ep.moe.exchange.steps import SteppedBody, Steps, WithParameters
from ray_ep.moe.site import Experts, LocalPairs, LocalWeights, Site
from ray_ep.moe.upload import upload
from ray_ep.placement.in_step.rules import StepRules

Agreeing = Generator[torch.Tensor, Any, tuple[DispatchPlan, Guests | None]]
"""Yields what must be read on the host; returns the plan of the exchange and the guests of the pass."""


class GroupedBody(SteppedBody):
    """The body of all layers but those that the fused one of the CPU computes.

    On a GPU the host waits for the device once a pass in forward, to read the sizes; with balance it reads all ranks'
    counts with them, and a second time where the balance moves pairs. A rank alone does not wait. Backward never does.
    Not run on a GPU yet.

    Args:
        site: of the layer.
        experts: what computes the pairs that this rank has received; not given: transformers' grouped kernel.
    """

    def __init__(self, site: Site, experts: Experts | None = None):
        super().__init__(site)
        self.experts = experts or transformers_experts

    def steps(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Steps:
        """See `SteppedBody.steps`."""
        meter = self.site.traffic.meter
        if self.site.traffic.size == 1:
            self.site.note(index, torch.zeros_like(index))
            received, pair_weights = alone(index, weights)
            rows, plan, guests = hidden, None, None
            if self.site.exchange.float8:  # as on any number of ranks
                rows = Rounded.apply(rows)  # type: ignore[no-untyped-call]
        else:
            params = list(module.parameters(recurse=False))
            plan, guests = yield from self._agree(rules_of(self.site, params, hidden), index, weights)
            received = plan.received
            meter.enter("pack")
            rows, pair_weights = dispatch(hidden, weights, plan)
        self.site.count_pairs(len(received.row))
        rows, local = _weights(module, rows, guests)
        meter.enter("")
        yield None
        meter.enter("experts")
        partial = self._compute(module, local, rows, pair_weights, received, guests)
        meter.enter("combine")
        out = partial if plan is None else combine(partial, plan)
        meter.enter("")
        return out

    def _agree(self, rules: StepRules | None, index: torch.Tensor, weights: torch.Tensor) -> Agreeing:
        """Who computes what, and whose weights travel for it (collective)."""
        site, traffic, meter = self.site, self.site.traffic, self.site.traffic.meter
        meter.enter("route")
        to, guests, experts = site.slots.served_by(index, site.slots.routes), None, len(site.slots.row_of)
        wanted = Wanted.of(index, to, traffic.size)
        if rules is None:
            asked = swap(wanted, traffic)
        else:
            asked = traffic.all_gather(torch.cat([counts_of(index, experts), wanted.sizes.reshape(-1)]))
        answer = yield from _read(asked, traffic.meter)
        if rules is not None:
            balance = planned(site, answer[:, :experts], rules)
            guests, sizes = balance.guests, answer[:, experts:].reshape(traffic.size, traffic.size, 2)
            answer = np.stack([sizes[traffic.rank], sizes[:, traffic.rank]])
            if balance.plan.moved:
                sends = upload(balance.plan.sends(traffic.rank), index.device)
                to = destinations(index, sends, traffic.rank)
                wanted = Wanted.of(index, to, traffic.size)
                answer = yield from _read(swap(wanted, traffic), traffic.meter)
        site.note(index, to)
        plan = plan_dispatch(wanted, weights, Sizes.of(*answer), traffic, site.exchange.float8)
        meter.enter("")
        return plan, guests

    def _compute(
        self, module: Any, local: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor, received: ReceivedPairs,
        guests: Guests | None,
    ) -> torch.Tensor:  # fmt: skip
        """Run each received pair through its expert and sum per received row: [N, H] -> [N, H]."""
        if not len(received.row):
            return nothing(local, rows, pair_weights)
        slots, row_of = self.site.slots, self.site.slots.row_of
        if guests is not None and guests.experts:
            here = slots.row_of32.astype(np.int64)
            here[guests.experts] = slots.held + np.arange(len(guests.experts))
            row_of = upload(here, row_of.device)
        pairs = LocalPairs(
            row=received.row, first=starts(received.row, len(rows)), expert_row=row_of[received.expert],
            of_guests=0 if guests is None else guests.pairs,
        )  # fmt: skip
        return self.experts(module, local, rows, pair_weights, pairs)


def transformers_experts(
    module: Any, weights: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor, pairs: LocalPairs
) -> torch.Tensor:
    """`Experts` by transformers' grouped kernel, whatever the layout; guests cost a copy of all weights."""
    params = dict(weights.own)
    if weights.guests:
        params = {name: torch.cat([own, weights.guests[name]]) for name, own in params.items()}
    view: Any = WithParameters(module, params)
    segments = Segments(pairs.row, len(rows), pairs.first)
    copies = CopyRows.apply(rows, segments)  # type: ignore[no-untyped-call]
    out = grouped_mm_experts_forward(view, copies, pairs.expert_row[:, None], pair_weights[:, None])
    partial: torch.Tensor = SumRows.apply(out, segments)  # type: ignore[no-untyped-call]
    return partial


def nothing(weights: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor) -> torch.Tensor:
    """What a rank without pairs, and so without rows, computes: its graph, so that backward exchanges here as well."""
    params = (*weights.own.values(), *weights.guests.values())
    partial: torch.Tensor = rows + pair_weights.sum() + sum(p[:0].sum() for p in params)
    return partial


def _weights(module: Any, rows: torch.Tensor, guests: Guests | None) -> tuple[torch.Tensor, LocalWeights]:
    """The weights of a pass, and rows [N, H], through which the guests' gradients find their moment (collective)."""
    own = dict(module.named_parameters(recurse=False))
    if guests is None:
        return rows, LocalWeights(own, {})
    rows, *found = BorrowedRows.apply(guests, rows, *own.values())  # type: ignore[no-untyped-call]
    mine, theirs = (dict(zip(own, part, strict=True)) for part in (found[: len(own)], found[len(own) :]))
    return rows, LocalWeights(mine, theirs if guests.experts else {})


def _read(asked: torch.Tensor, meter: Meter) -> Generator[torch.Tensor, Any, np.ndarray]:
    meter.enter("")
    answer: np.ndarray = yield asked
    meter.enter("route")
    return answer
