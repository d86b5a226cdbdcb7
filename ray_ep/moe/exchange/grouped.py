"""The grouped body: any layout of experts on any device, between two exchanges.

The exchange is dispatch.py's. What computes in between is passed in: here it is transformers' own grouped kernel.
T tokens, K top_k, H hidden, N rows received, P pairs received, S experts held, G guests.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ray_ep.moe.balance.guests import BorrowedRows, Guests, destinations
from ray_ep.moe.balance.step import balanced
from ray_ep.moe.exchange.dispatch import combine, dispatch, plan_dispatch
from ray_ep.moe.site import Experts, LocalPairs, LocalWeights, Site


class GroupedBody:
    """The body of all layers but those that the fused one of the CPU computes.

    Args:
        site: of the layer.
        experts: what computes the pairs that this rank has received; not given: transformers' grouped kernel.
    """

    def __init__(self, site: Site, experts: Experts | None = None):
        self.site, self.experts = site, experts or transformers_experts

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        site, meter = self.site, self.site.traffic.meter
        balance = balanced(site, list(module.parameters(recurse=False)), hidden, index, stays=False)
        meter.enter("route")
        if balance is None:
            to = site.slots.served_by(index, site.slots.routes)
        else:
            sends = torch.from_numpy(balance.plan.sends(site.traffic.rank)).to(site.slots.routes)
            to = destinations(index, sends, site.traffic.rank)
        site.note(index, to)
        plan = plan_dispatch(index, to, site.traffic, site.exchange.float8)
        site.count_pairs(len(plan.received.row))
        meter.enter("pack")
        rows, pair_weights = dispatch(hidden, weights, plan)
        guests = None if balance is None else balance.guests
        rows, local = _weights(module, rows, guests)
        row_of, of_guests = site.slots.row_of, 0
        if balance is not None and guests is not None:
            of_guests = int(balance.plan.quota[guests.experts, site.traffic.rank].sum())
            row_of = row_of.clone()
            row_of[guests.experts] = site.slots.held + torch.arange(len(guests.experts), device=row_of.device)
        meter.enter("experts")
        if len(plan.received.row):
            row = plan.received.row
            first = torch.searchsorted(row, torch.arange(len(rows) + 1, device=row.device))
            expert_row = row_of[plan.received.expert]
            pairs = LocalPairs(row=row, first=first, expert_row=expert_row, of_guests=of_guests)
            partial = self.experts(module, local, rows, pair_weights, pairs)
        else:  # no rows either: but a graph, through the weights too, so that backward exchanges here as well
            params = (*local.own.values(), *local.guests.values())
            partial = rows + pair_weights.sum() + sum(p[:0].sum() for p in params)
        meter.enter("combine")
        out = combine(partial, plan)
        meter.enter("")
        return out


def transformers_experts(
    module: Any, weights: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor, pairs: LocalPairs
) -> torch.Tensor:
    """`Experts` by transformers' grouped kernel, whatever the layout; guests cost a copy of all weights."""
    params = dict(weights.own)
    if weights.guests:
        params = {name: torch.cat([own, weights.guests[name]]) for name, own in params.items()}
    view = ExtendedModule(module, params, len(next(iter(params.values()))))
    out = grouped_mm_experts_forward(view, rows[pairs.row], pairs.expert_row[:, None], pair_weights[:, None])
    partial = torch.zeros(len(rows), out.shape[1], dtype=torch.float32, device=out.device)
    return partial.index_add(0, pairs.row, out.float()).to(rows.dtype)


class ExtendedModule:
    """An experts module with other per-expert parameters, for the length of one call of transformers' kernel."""

    def __init__(self, module: torch.nn.Module, params: dict[str, torch.Tensor], num_experts: int):
        self.module, self.params, self.num_experts = module, params, num_experts

    def __getattr__(self, name: str) -> Any:
        return self.params[name] if name in self.params else getattr(self.module, name)


def _weights(module: Any, rows: torch.Tensor, guests: Guests | None) -> tuple[torch.Tensor, LocalWeights]:
    """The weights of a pass, and rows [N, H], through which the guests' gradients find their moment (collective)."""
    own = dict(module.named_parameters(recurse=False))
    if guests is None:
        return rows, LocalWeights(own, {})
    rows, *found = BorrowedRows.apply(guests, rows, *own.values())  # type: ignore[no-untyped-call]
    mine, theirs = (dict(zip(own, part, strict=True)) for part in (found[: len(own)], found[len(own) :]))
    return rows, LocalWeights(mine, theirs if guests.experts else {})
