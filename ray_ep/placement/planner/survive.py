"""Plans that outlive lost nodes: every expert on k + 1 nodes, by an assignment that disturbs the plan least.

The planner first puts experts where the step is fastest; then this adds, for each layer, the (expert, node) pairs that
are missing under two rules: each expert on at least k + 1 nodes, each node within its slots. That is a bipartite
b-matching, completed by augmenting paths (as Hopcroft and Karp's, one at a time). Pure NumPy.
Replicas that are there for safety alone take no far tokens (their share is 0): they serve their own node's.
E experts, R ranks, S slots, N nodes by name (a lost machine takes all its ranks, however its links are).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.predict import predict
from ray_ep.placement.placement import Floats, Ints, Placement
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology


def survives(placement: Placement, node_of: npt.ArrayLike, nodes: int) -> bool:
    """Whether every expert keeps a replica when any `nodes` nodes are lost; node_of [R]."""
    return bool(layers_that_survive(placement, node_of, nodes).all())


def layers_that_survive(placement: Placement, node_of: npt.ArrayLike, nodes: int) -> npt.NDArray[np.bool_]:
    """[L] the same of each layer."""
    on = _nodes_with(placement.slots, placement.num_experts, _numbered(node_of))
    return np.asarray((on.sum(2) > nodes).all(1))


def check_room(room: Ints, experts: int, node_of: npt.ArrayLike, nodes: int) -> None:
    """Raise PlacementError, saying what would do, unless room [R] can hold `experts` on nodes + 1 nodes each."""
    if nodes < 0:
        raise PlacementError(f"survive_nodes={nodes}: expected 0 or more")
    number = _numbered(node_of)
    have = int(number.max()) + 1
    if nodes >= have:
        raise PlacementError(f"survive_nodes={nodes} of {have} nodes: at most {have - 1} may be lost")
    usable = np.minimum(np.bincount(number, np.minimum(room, experts)), experts)
    if usable.sum() < experts * (nodes + 1):
        per_rank = -(-experts * (nodes + 1) // len(room))
        raise PlacementError(
            f"survive_nodes={nodes} needs every one of {experts} experts on {nodes + 1} nodes, {experts * (nodes + 1)} "
            f"slots; the {have} nodes have {int(usable.sum())} of use: {per_rank} slots a rank on even nodes would do"
        )


def fewest_slots(experts: int, node_of: npt.ArrayLike, nodes: int) -> int:
    """Slots of a rank, the same on all, with which any `nodes` nodes may be lost.

    Raises:
        PlacementError: there are no more nodes than may be lost.
    """
    ranks = len(np.asarray(node_of))
    for slots in range(-(-experts * (max(nodes, 0) + 1) // ranks), experts):
        try:
            check_room(np.full(ranks, slots), experts, node_of, nodes)
        except PlacementError:
            continue
        return slots
    check_room(np.full(ranks, experts), experts, node_of, nodes)
    return experts


def secured(slots: Ints, load: Floats, room: Ints, node_of: npt.ArrayLike, nodes: int) -> tuple[Ints, Floats]:
    """Slots [R, S] with every expert on nodes + 1 nodes, and shares [R, S]: 0 for replicas that safety alone added.

    Args:
        slots: [R, S] the plan. load: [E]. room: [R]. node_of: [R]. nodes: how many may be lost.
    """
    number, experts = _numbered(node_of), len(load)
    had = _nodes_with(slots[None], experts, number)[0]  # [E, N]
    want = had
    if (had.sum(1) <= nodes).any():
        room_of_node = np.minimum(np.bincount(number, np.minimum(room, experts)), experts).astype(np.int64)
        want = _assign(had, load, room_of_node, nodes + 1)
    out, share = np.full_like(slots, -1), np.ones(slots.shape)
    for n in range(want.shape[1]):
        _fill(out, slots, np.nonzero(number == n)[0], want[:, n], load, room)
    added = want & ~had
    homeless = (want & had).sum(1) == 0  # every planned node gave the expert up: its far tokens go to any
    for r in range(len(out)):
        for s, e in enumerate(out[r]):
            share[r, s] = 0.0 if e >= 0 and added[e, number[r]] and not homeless[e] else 1.0
    return out, share


def _assign(had: npt.NDArray[np.bool_], load: Floats, room: Ints, least: int) -> npt.NDArray[np.bool_]:
    """[E, N] the planned pairs, and more until each expert has `least` nodes; the hottest experts choose first.

    A missing pair takes a free slot, else the place of the coldest replica that its expert can spare, else pushes
    another expert to a further node: a shortest augmenting path, so that it is found wherever there is one.
    """
    want = had.copy()
    for e in np.argsort(-load, kind="stable"):
        while want[e].sum() < least:
            _augment(want, int(e), load, room, least)
    return want


def _augment(want: npt.NDArray[np.bool_], expert: int, load: Floats, room: Ints, least: int) -> None:
    """Give `expert` one more node. want [E, N] in place; no other expert falls below `least` that was not."""
    nodes = want.shape[1]
    by_room = np.argsort(want.sum(0) - room, kind="stable")  # the emptiest first
    came: dict[int, tuple[int, int]] = {int(n): (expert, -1) for n in by_room if not want[expert, n]}
    queue = list(came)
    for n in queue:
        spare = np.nonzero(want[:, n] & (want.sum(1) > least))[0]
        if want[:, n].sum() >= room[n] and not len(spare):
            for m in range(nodes):
                movers = np.nonzero(want[:, n] & ~want[:, m])[0]
                if m not in came and len(movers):
                    came[m] = (int(movers[np.argmin(load[movers])]), n)
                    queue.append(m)
            continue
        if want[:, n].sum() >= room[n]:
            want[spare[np.argmin(load[spare])], n] = False
        while n >= 0:  # back along the path: each mover leaves the node before for this one
            mover, before = came[n]
            want[mover, n] = True
            if before >= 0:
                want[mover, before] = False
            n = before
        return
    raise AssertionError("check_room has made sure that there is a place")


def _fill(out: Ints, plan: Ints, ranks: Ints, want: npt.NDArray[np.bool_], load: Floats, room: Ints) -> None:
    """Fill a node's `ranks` of `out` [R, S] with the experts wanted: where the plan has them, else by load. In place.

    A second replica inside the node stays where a slot is left for it.
    """
    due = set(np.nonzero(want)[0].tolist())
    spare = []
    for r in ranks:
        for s in range(room[r]):
            e = int(plan[r, s])
            if e in due:
                out[r, s] = e
                due.remove(e)
            elif e >= 0 and want[e]:
                spare.append((r, s, e))
    weight = {int(r): float(load[out[r][out[r] >= 0]].sum()) for r in ranks}
    for e in sorted(due, key=lambda e: (-load[e], e)):
        free = [int(r) for r in ranks if (out[r, : room[r]] < 0).any()]
        r = min(free, key=lambda r: (weight[r], r))
        out[r, int(np.argmax(out[r, : room[r]] < 0))] = e
        weight[r] += float(load[e]) / want.shape[0]
    for r, s, e in spare:
        if out[r, s] < 0 and e not in out[r]:
            out[r, s] = e


def _numbered(node_of: npt.ArrayLike) -> Ints:
    return np.unique(np.asarray(node_of), return_inverse=True)[1].astype(np.int64)


def _nodes_with(slots: Ints, experts: int, number: Ints) -> npt.NDArray[np.bool_]:
    """[L, E, N] whether a node has a slot with the expert; slots [L, R, S]."""
    on = np.zeros((len(slots), experts + 1, int(number.max()) + 1), bool)
    layer, rank, slot = np.nonzero(slots >= 0)
    on[layer, slots[layer, rank, slot], number[rank]] = True
    return on[:, :-1]


@dataclass(frozen=True, slots=True)
class Price:
    """What safety costs against a plan without it.

    Args:
        slots: filled slots more, all layers. bytes: memory of them on the ranks together (weights alone).
        remote_nodes: other nodes that a token visits more, mean over layers. step_seconds: predicted step longer by.
            None: not known of counts alone.
    """

    slots: int
    bytes: float
    remote_nodes: float | None
    step_seconds: float | None

    def __str__(self) -> str:
        """One sentence for a report."""
        words = f"{self.slots:+d} replicas ({self.bytes / 2**30:+.2f} GiB of weights)"
        if self.remote_nodes is None or self.step_seconds is None:
            return words
        return f"{words}, {self.remote_nodes:+.3f} remote nodes a token, {self.step_seconds * 1e3:+.3f} ms a step"


def price(
    safe: Placement,
    free: Placement,
    statistics: RoutingStatistics,
    topology: Topology,
    costs: StepCosts | None = None,
    level: str = "node",
) -> Price:
    """The price of `safe` against `free`, both for the same statistics; raises PlacementError where they do not fit."""
    costs = costs or StepCosts()
    a, b = (predict(p, statistics, topology, costs, level) for p in (safe, free))
    more = int((safe.slots >= 0).sum() - (free.slots >= 0).sum())
    nodes = float((a.remote_nodes - b.remote_nodes).mean()) if len(a.remote_nodes) else 0.0
    return Price(more, more * costs.expert_bytes, nodes, a.step_seconds - b.step_seconds)
