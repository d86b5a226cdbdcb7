"""Events that say where a run stands: its state, who is in it, and which placement it has and why. Pure.

Whoever shows a run rebuilds from them what is true now, and what was at any time before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from ray_ep.collective import Membership
from ray_ep.driver.records import Event
from ray_ep.driver.states import State
from ray_ep.placement import Placement

_TOLD = ("host", "address", "pid")


class Cause(Enum):
    """Why a run has another placement."""

    START = "start"  # it begins, or goes on, with this one
    REBALANCE = "rebalance"  # a decision that it pays
    ASKED = "asked"  # somebody gave it
    MEMBERSHIP = "membership"  # ranks came or went
    HANDOVER = "handover"  # ranks that leave have handed over what they own
    LOSS = "loss"  # ranks were lost


def state_event(before: State, after: State, why: str) -> Event:
    """The run is at something else."""
    return Event("state", why, {"from": before.value, "to": after.value})


def members_event(membership: Membership, where: Sequence[Mapping[str, Any]], device: str) -> Event:
    """Who is in an epoch.

    Args:
        where: [R] of each rank its `node` (Ray's id), host, address and pid, as far as known. device: cpu or cuda.
    """
    ranks = [
        {"member": member, "node": node, "node_id": place.get("node"), "device": device}
        | {name: place.get(name) for name in _TOLD}
        for member, node, place in zip(membership.members, membership.node_of, where, strict=True)
    ]
    words = f"{membership.size} ranks on {len(set(membership.node_of))} node(s) in epoch {membership.epoch}"
    return Event("members", words, {"epoch": membership.epoch, "ranks": ranks})


def placement_event(placement: Placement, cause: Cause, words: str) -> Event:
    """The run has a placement from here on; the words are shown as the reason of the experts that moved for it."""
    return Event("placement", words, {"placement_version": placement.version, "cause": cause.value})
