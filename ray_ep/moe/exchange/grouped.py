"""The grouped body: any layout of experts on any device, by transformers' own grouped kernel between two exchanges.

The exchange is dispatch.py's, the weights stay in the transformers module. No model search here.
T tokens, K top_k, H hidden, N rows received, P pairs received, S experts held, G guests.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ray_ep.moe.balance.guests import BorrowedRows, destinations
from ray_ep.moe.balance.step import balanced
from ray_ep.moe.exchange.dispatch import combine, dispatch, plan_dispatch
from ray_ep.moe.site import Site


class GroupedBody:
    """The body of all layers but those that the fused one computes.

    Args:
        site: of the layer.
    """

    def __init__(self, site: Site):
        self.site = site

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        site, meter = self.site, self.site.traffic.meter
        params = list(module.parameters(recurse=False))
        balance = balanced(site, params, hidden, index, stays=False)
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
        view, row_of = module, site.slots.row_of
        if balance is not None and balance.guests is not None:
            guests, held = balance.guests, site.slots.held
            rows, *more = BorrowedRows.apply(guests, rows, *params)  # type: ignore[no-untyped-call]
            names = [name for name, _ in module.named_parameters(recurse=False)]
            view = ExtendedModule(module, dict(zip(names, more, strict=True)), held + len(guests.experts))
            row_of = row_of.clone()
            row_of[guests.experts] = held + torch.arange(len(guests.experts), device=row_of.device)
        meter.enter("experts")
        partial = experts(view, rows, pair_weights, plan.received.row, row_of[plan.received.expert])
        meter.enter("combine")
        out = combine(partial, plan)
        meter.enter("")
        return out


class ExtendedModule:
    """An experts module with other per-expert parameters, for the length of one call of transformers' kernel."""

    def __init__(self, module: torch.nn.Module, more: dict[str, torch.Tensor], num_experts: int):
        self.module, self.more, self.num_experts = module, more, num_experts

    def __getattr__(self, name: str) -> Any:
        return self.more[name] if name in self.more else getattr(self.module, name)


def experts(
    module: Any, rows: torch.Tensor, pair_weights: torch.Tensor, row: torch.Tensor, expert_row: torch.Tensor
) -> torch.Tensor:
    """Run each received pair through its expert and sum per received row: [N, H] -> [N, H].

    Args:
        pair_weights: [P]. row: [P] of `rows`, ascending. expert_row: [P] of the module's parameters.
    """
    if not len(row):
        # No pairs, so no rows: but a graph, through the weights too, so that backward exchanges here as well.
        params = module.more.values() if isinstance(module, ExtendedModule) else module.parameters(recurse=False)
        nothing: torch.Tensor = rows + pair_weights.sum() + sum(p[:0].sum() for p in params)
        return nothing
    out = grouped_mm_experts_forward(module, rows[row], expert_row[:, None], pair_weights[:, None])  # [P, H]
    partial = torch.zeros(len(rows), out.shape[1], dtype=torch.float32, device=out.device)
    return partial.index_add(0, row, out.float()).to(rows.dtype)
