"""A load-only balancer of EPLB's kind, for comparison and as a fallback: it sees neither links nor co-activation.

Own code from the idea that DeepSeek published with DeepSeek-V3 (arXiv 2412.19437, 3.4; "expert parallelism load
balancer"): give the spare slots to the experts with the most load a replica, then pack heaviest first, always on the
least loaded rank that has room. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.baselines import room_of_ranks
from ray_ep.placement.placement import Floats, Ints, Placement


def load_only(
    load: npt.ArrayLike,
    ranks: int,
    slots_per_rank: int | Sequence[int] | None = None,
    node_of: npt.ArrayLike | None = None,
    expert_groups: int = 1,
) -> Placement:
    """Balance load alone.

    Args:
        load: [L, E] tokens of each expert.
        ranks: R.
        slots_per_rank: one number, or one per rank; None: just enough for every expert.
        node_of: [R] node of each rank; None: one node.
        expert_groups: consecutive experts that a router with limited groups picks together. Where it is a multiple of
            the number of nodes, nodes get whole groups (the hierarchical variant), otherwise ranks are filled
            regardless of nodes (the global one).

    Raises:
        PlacementError: fewer slots than experts, load that is not finite counts [L, E], groups that do not divide E.
    """
    counts = np.asarray(load, np.float64)
    if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
        raise PlacementError(f"load has shape {counts.shape}: expected finite counts [layers, experts]")
    experts = counts.shape[1]
    room = np.asarray(room_of_ranks(experts, ranks, slots_per_rank), np.int64)
    nodes = np.zeros(ranks, np.int64) if node_of is None else np.unique(np.asarray(node_of), return_inverse=True)[1]
    if len(nodes) != ranks:
        raise PlacementError(f"node_of has {len(nodes)} entries for {ranks} ranks")
    if expert_groups < 1 or experts % expert_groups:
        raise PlacementError(f"expert_groups={expert_groups} does not divide {experts} experts")
    num_nodes = int(nodes.max()) + 1
    if expert_groups % num_nodes:
        nodes, num_nodes, expert_groups = np.zeros(ranks, np.int64), 1, 1
    slots = np.full((len(counts), ranks, int(room.max(initial=0))), -1, np.int64)
    for layer, row in enumerate(counts):
        owner = _groups_to_nodes(row, expert_groups, num_nodes)
        for n in range(num_nodes):
            members, mine = np.nonzero(nodes == n)[0], np.nonzero(owner == n)[0]
            if len(mine) > room[members].sum():
                raise PlacementError(f"node {n} has {room[members].sum()} slots for {len(mine)} experts of its groups")
            _fill_node(slots[layer], row, mine, members, room)
    return Placement(slots, experts)


def _groups_to_nodes(load: Floats, groups: int, nodes: int) -> Ints:
    """[E] node of each expert: whole groups, heaviest first, to the lightest node that still lacks groups."""
    size = len(load) // groups
    total = load.reshape(groups, size).sum(1)
    weight, taken = np.zeros(nodes), np.zeros(nodes, np.int64)
    where = np.zeros(groups, np.int64)
    for g in np.argsort(-total, kind="stable"):
        open_nodes = np.nonzero(taken < groups // nodes)[0]
        n = open_nodes[np.argmin(weight[open_nodes])]
        where[g], weight[n], taken[n] = n, weight[n] + total[g], taken[n] + 1
    return np.repeat(where, size)


def _fill_node(slots: Ints, load: Floats, experts: Ints, ranks: Ints, room: Ints) -> None:
    """Replicate and pack `experts` over `ranks`, into `slots` [R, S] in place."""
    copies = np.ones(len(experts), np.int64)
    for _ in range(int(np.minimum(room[ranks], len(experts)).sum()) - len(experts)):
        each = np.where(copies < len(ranks), load[experts] / copies, -1.0)
        copies[int(np.argmax(each))] += 1
    weight, used = np.zeros(len(ranks)), np.zeros(len(ranks), np.int64)
    items = np.repeat(np.arange(len(experts)), copies)
    each = load[experts] / copies
    for i in items[np.argsort(-each[items], kind="stable")]:
        has = (slots[ranks] == experts[i]).any(1)
        free = np.nonzero((used < room[ranks]) & ~has)[0]
        if len(free):  # a replica whose every free rank has the expert already adds nothing
            r = free[np.argmin(weight[free])]
            slots[ranks[r], used[r]] = experts[i]
            weight[r] += each[i]
            used[r] += 1
        elif not (slots[ranks] == experts[i]).any():
            raise AssertionError("the first replica of an expert always finds a free slot")
