"""The balance of one layer in one pass, as both bodies that balance ask for it.

The rules and their costs are balancer.py's, what travels is guests.py's, where the layer is comes from site.py.
E experts, S experts held, T tokens, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ray_ep.moe.balance.guests import Guests, ResidentGuests
from ray_ep.moe.counters import bincount
from ray_ep.moe.passes import recomputing
from ray_ep.moe.site import Site
from ray_ep.placement.in_step.rules import StepPlan, StepRules


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBalance:
    """Who computes how many pairs of one layer in one pass, and whose weights that takes."""

    plan: StepPlan
    guests: Guests | None  # that travel now; None: no rank has any
    resident: ResidentGuests | None  # that stayed, whose rows follow the rank's own; None: nothing stays


def balanced(
    site: Site, weights: list[torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, stays: bool
) -> StepBalance | None:
    """The balance for this rank's choices index [T, K] (collective); None: there is none here.

    Args:
        weights: [S, ...] per-expert parameters. hidden: [T, H], for its size.
        stays: guests may stay from this pass on, if it is one of inference.
    """
    rules = rules_of(site, weights, hidden)
    if rules is None:
        return None
    resident = _resident(site, rules) if stays else None
    site.traffic.meter.enter("route")
    gathered = site.traffic.all_gather(counts_of(index, len(site.slots.row_of)).to(torch.int32))
    site.traffic.group.wait()
    return planned(site, gathered.cpu().numpy(), rules, resident)


def rules_of(site: Site, weights: list[torch.Tensor], hidden: torch.Tensor) -> StepRules | None:
    """The rules of the layer's balance in this pass; None: there is none here (collective at first)."""
    return site.shared.balancer.rules(site.index, weights, hidden, torch.is_grad_enabled())


def counts_of(index: torch.Tensor, experts: int) -> torch.Tensor:
    """int64 [E]: how often each expert was chosen in index [T, K], -1 for no choice."""
    return bincount(torch.where(index >= 0, index, experts).reshape(-1), experts + 1)[:experts]


def planned(site: Site, everyone: np.ndarray, rules: StepRules, resident: ResidentGuests | None = None) -> StepBalance:
    """The balance for the counts of all ranks [R, E]."""
    balancer = site.shared.balancer
    plan = balancer.plan(everyone, rules if resident is None else resident.rules, not recomputing())
    row_of = site.slots.row_of32 if resident is None else resident.row_of
    return StepBalance(plan=plan, guests=Guests.of(plan, row_of, site.traffic, balancer.keep), resident=resident)


def _resident(site: Site, rules: StepRules) -> ResidentGuests | None:
    """Where guests stay; None if weights may change, or there is no room for one in every layer."""
    inference, slots = site.shared.passes.now.inference, site.shared.balancer.slots_to_keep()
    if inference is None or site.index not in inference.packed or torch.is_grad_enabled() or not slots:
        return None
    if site.index not in inference.resident:
        inference.resident[site.index] = ResidentGuests(rules, slots, site.slots.row_of32, site.slots.held)
    return inference.resident[site.index]
