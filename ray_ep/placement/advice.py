"""Would rebalancing help, and what would it cost: told from recorded statistics before anything is enabled.

Pure NumPy, exact expectations for load and a sampled count for nodes. No clock time is predicted here: balancedness
bounds what the experts' compute can gain, remote nodes per token what the slow links can.
Dimensions: L MoE layers, E experts, R ranks, S slots, N sampled tokens, K top_k, J nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Floats, Ints, Placement
from ray_ep.placement.statistics import RoutingStatistics

WORTH = 0.05
"""A gain below this share is within what drift between recording and serving takes back: the advice is to stay."""

TOKENS = 4096
"""Sampled tokens a layer that are followed to their nodes."""


@dataclass(frozen=True)
class Outlook:
    """One placement under recorded routing.

    Args:
        balancedness: mean rank load / max rank load, mean over layers (1 is perfect).
        node_balancedness: the same of nodes: what is left where ranks of a node are balanced in each step.
        remote_nodes: other nodes that a token visits in one layer; None where no token sets were recorded.
        replica_slots: filled slots beyond one an expert, over all layers and ranks.
        rank_extra_slots: slots of the fullest rank beyond an even share of the experts, over all layers.
        moved_slots: experts that come to a rank which lacks them now, over all layers and ranks.
    """

    balancedness: float
    node_balancedness: float
    remote_nodes: float | None
    replica_slots: int
    rank_extra_slots: int
    moved_slots: int


def outlook(
    statistics: RoutingStatistics,
    placement: Placement,
    node_of: Sequence[int] | Ints,
    current: Placement | None = None,
    nearest: bool = True,
) -> Outlook:
    """Judge one placement; tokens start evenly on all ranks and go to the nearest replica, split by `shares`.

    Args:
        node_of: [R] node of each rank.
        current: what runs now, to count what moves; None: nothing does.
        nearest: False: any replica serves, by `shares`, as in vLLM and in SGLang's dynamic dispatch.

    Raises:
        PlacementError: statistics of another model, or node_of of another number of ranks.
    """
    layers, experts = statistics.load.shape
    if (placement.num_layers, placement.num_experts) != (layers, experts):
        raise PlacementError(
            f"placement of {placement.num_layers} layers and {placement.num_experts} experts, statistics of {layers} "
            f"and {experts}: they must be of one model"
        )
    nodes = np.asarray(node_of, np.int64)
    if nodes.shape != (placement.num_ranks,):
        raise PlacementError(f"node_of has {nodes.size} entries for {placement.num_ranks} ranks")
    nodes = np.unique(nodes, return_inverse=True)[1]
    member = (nodes[:, None] == np.arange(nodes.max(initial=0) + 1)).astype(np.float64)  # [R, J]
    share = _shares(placement)  # [L, E, R]
    taken = [_nearest(share[n], member) if nearest else share[n] for n in range(layers)]
    load = np.stack([statistics.load[n] @ taken[n] for n in range(layers)])
    filled = (placement.slots >= 0).sum((0, 2))  # [R]
    return Outlook(
        _balancedness(load),
        _balancedness(load @ member),
        _remote_nodes(statistics.sample, share, nodes, member, nearest),
        int(filled.sum()) - layers * experts,
        int(filled.max()) - layers * experts // placement.num_ranks,
        0 if current is None else moved_slots(current, placement),
    )


def moved_slots(old: Placement, new: Placement) -> int:
    """Experts that `new` puts on ranks where `old` has them not; all of them where the ranks are other ones."""
    before, after = _shares(old) > 0, _shares(new) > 0
    return int(after.sum()) if before.shape != after.shape else int((after & ~before).sum())


def advice(
    statistics: RoutingStatistics,
    placements: Mapping[str, Placement],
    node_of: Sequence[int] | Ints | None = None,
    expert_bytes: int | None = None,
    current: str | None = None,
    nearest: bool = True,
    level: str = "rank",
) -> str:
    """A table of the placements and, in words, whether to change to one of them and what that costs.

    Args:
        placements: by name, what runs now among them.
        node_of: [R] node of each rank; None: all on one.
        expert_bytes: bytes of one expert's weights in one layer; None: costs are given in slots.
        current: the name of what runs now; None: the first.
        nearest: whether the engine sends a token to the nearest replica, or (False) to any, as `outlook` says.
        level: what holds a step up: the busiest rank, or (node) the busiest node, its ranks being balanced in the step.

    Raises:
        PlacementError: no placements, a name that is not there, placements or nodes that do not fit the statistics.
    """
    judged, now = _judged(statistics, placements, node_of, current, nearest)
    lines = [_row("placement", "balance", "nodes'", "remote nodes", "replica slots", "moved slots")]
    for name, o in judged.items():
        remote = "-" if o.remote_nodes is None else f"{o.remote_nodes:.2f}"
        lines.append(
            _row(
                name,
                f"{o.balancedness:.3f}",
                f"{o.node_balancedness:.3f}",
                remote,
                str(o.replica_slots),
                str(o.moved_slots),
            )
        )
    return "\n".join([*lines, "", *_words(judged, now, expert_bytes, nearest, level)])


def advice_words(
    statistics: RoutingStatistics,
    placements: Mapping[str, Placement],
    node_of: Sequence[int] | Ints | None = None,
    expert_bytes: int | None = None,
    current: str | None = None,
    nearest: bool = True,
    level: str = "rank",
) -> list[str]:
    """The sentences of `advice` without its table: each placement's change and cost, what is assumed, the verdict."""
    judged, now = _judged(statistics, placements, node_of, current, nearest)
    return _words(judged, now, expert_bytes, nearest, level)


def _judged(
    statistics: RoutingStatistics,
    placements: Mapping[str, Placement],
    node_of: Sequence[int] | Ints | None,
    current: str | None,
    nearest: bool,
) -> tuple[dict[str, Outlook], str]:
    """The outlook of each placement, and the name of what runs now."""
    if not placements:
        raise PlacementError("advice: no placements to compare")
    now = next(iter(placements)) if current is None else current
    if now not in placements:
        raise PlacementError(f"advice: current is {now!r}: allowed are {', '.join(placements)}")
    judged = {
        name: outlook(statistics, p, [0] * p.num_ranks if node_of is None else node_of, placements[now], nearest)
        for name, p in placements.items()
    }
    return judged, now


def _words(judged: Mapping[str, Outlook], now: str, expert_bytes: int | None, nearest: bool, level: str) -> list[str]:
    lines = [_sentence(name, judged[now], judged[name], expert_bytes, level) for name in judged if name != now]
    if judged[now].remote_nodes is None:
        lines.append("Remote nodes are unknown: only counts were recorded (SGLang: record in mode per_token).")
    if any(o.replica_slots for o in judged.values()):
        lines.append(f"Assumed: a token goes to {'its nearest replica' if nearest else 'any replica, near or far'}.")
    return [*lines, _verdict(now, judged, level)]


def _sentence(name: str, now: Outlook, new: Outlook, expert_bytes: int | None, level: str) -> str:
    """What one placement changes and costs."""
    before, after = _evenness(now, level), _evenness(new, level)
    parts = [
        f"the busiest {level} has {1 / after:.2f}x the mean load (now {1 / before:.2f}x), so expert compute takes "
        f"{_change(_ratio(before, after))}"
    ]
    if now.remote_nodes is not None and new.remote_nodes is not None:
        change = f", {_change(new.remote_nodes / now.remote_nodes)} on the slow links" if now.remote_nodes else ""
        parts.append(f"a token visits {new.remote_nodes:.2f} other nodes a layer (now {now.remote_nodes:.2f}{change})")
    more, rank_more = new.replica_slots - now.replica_slots, new.rank_extra_slots - now.rank_extra_slots
    cost = (
        f"costs {_amount(more, expert_bytes)} more memory in all, {_amount(rank_more, expert_bytes)} on the fullest "
        f"rank, and {_amount(new.moved_slots, expert_bytes)} moved once"
    )
    return f"{name}: {'; '.join(parts)}; {cost}."


def _verdict(now: str, judged: Mapping[str, Outlook], level: str) -> str:
    """Change, stay, or the trade in between: which of compute and links bounds a step is not known here."""
    gains = {name: _gains(judged[now], o, level) for name, o in judged.items() if name != now}
    clear = [name for name, g in gains.items() if max(g) >= WORTH and min(g) >= -WORTH]
    if clear:
        best = max(clear, key=lambda name: max(gains[name]))
        return (
            f"Rebalancing would help: {best} saves up to {max(gains[best]):.0%} if compute or slow links bound a step; "
            "that is a bound: measure throughput, every stall in it, against what runs now before you keep it."
        )
    mixed = [name for name, g in gains.items() if max(g) >= WORTH]
    if mixed:
        best = max(mixed, key=lambda name: sum(gains[name]))
        compute, links = gains[best]
        better, worse = ("expert compute", "slow links") if compute > links else ("slow links", "expert compute")
        return f"Stay with {now} unless its steps wait for {better}: {best} is better there, but worse for {worse}."
    return f"Stay with {now}: nothing here gains {WORTH:.0%} or more, and less than that drift may take back."


def _evenness(o: Outlook, level: str) -> float:
    return o.node_balancedness if level == "node" else o.balancedness


def _gains(now: Outlook, new: Outlook, level: str) -> tuple[float, float]:
    """Shares of expert compute and of slow-link traffic that are saved; negative where there is more."""
    links = 0.0
    if now.remote_nodes is not None and new.remote_nodes is not None:
        links = 1 - _ratio(new.remote_nodes, now.remote_nodes)
    return 1 - _ratio(_evenness(now, level), _evenness(new, level)), links


def _ratio(a: float, b: float) -> float:
    return 1.0 if a == b else a / max(b, 1e-12)


def _change(ratio: float) -> str:
    return "as much" if abs(ratio - 1) < 0.005 else f"{abs(1 - ratio):.0%} {'less' if ratio < 1 else 'more'}"


def _amount(slots: int, expert_bytes: int | None) -> str:
    if expert_bytes is None:
        return f"{slots} slots"
    size = slots * expert_bytes
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if abs(size) >= s / 10 or not size), ("kB", 1e3))
    return f"{size / scale:.2f} {unit}"


def _row(*cells: str) -> str:
    return f"{cells[0]:<20}" + "".join(f"{c:>15}" for c in cells[1:])


def _shares(placement: Placement) -> Floats:
    """[L, E, R] share of an expert's far traffic that each rank takes; positive exactly where a rank holds it."""
    out = np.zeros((placement.num_layers, placement.num_experts, placement.num_ranks))
    weight = np.ones(placement.slots.shape) if placement.shares is None else placement.shares
    layer, rank, slot = np.nonzero(placement.slots >= 0)
    # A replica with share 0 still serves its own rank: a trace of weight keeps it visible and moves no traffic.
    np.add.at(out, (layer, placement.slots[layer, rank, slot], rank), weight[layer, rank, slot] + 1e-9)
    return np.asarray(out / out.sum(2, keepdims=True))


def _nearest(share: Floats, member: Floats) -> Floats:
    """[E, R] part of an expert's tokens that each rank takes: a source rank that holds the expert keeps its own, else
    the replicas of its node take them, else all replicas."""
    holds = share > 0  # [E, R]
    near = share @ member  # [E, J] share of a node's replicas
    has = near > 0
    lacking = (~holds).astype(np.float64) @ member  # [E, J] source ranks of a node without the expert
    inside = np.divide(lacking, near, out=np.zeros_like(near), where=has)  # per unit of share
    outside = (lacking * ~has).sum(1)  # [E] source ranks on nodes without the expert
    return np.asarray((holds + share * (inside @ member.T + outside[:, None])) / holds.shape[1])


def _balancedness(load: Floats) -> float:
    top = load.max(1)
    return float(np.where(top > 0, load.mean(1) / np.maximum(top, 1e-30), 1.0).mean()) if len(load) else 1.0


def _remote_nodes(
    sample: npt.NDArray[np.int32] | None, share: Floats, nodes: Ints, member: Floats, nearest: bool
) -> float | None:
    """Mean over layers and sampled tokens of the distinct other nodes that serve a token."""
    if sample is None or not sample.shape[1]:
        return None
    rng = np.random.default_rng(0)
    visits = []
    for layer, tokens in enumerate(sample[:, :TOKENS]):
        source = nodes[rng.integers(0, len(nodes), len(tokens))]  # [N]
        near = share[layer] @ member  # [E, J] share of a node's replicas
        far = np.cumsum(near, 1)
        local = (near[tokens, source[:, None]] > 0) & nearest  # [N, K]
        drawn = (rng.random(tokens.shape)[:, :, None] >= far[tokens]).sum(2)  # [N, K] a node by share
        goes = np.where(local, source[:, None], np.minimum(drawn, member.shape[1] - 1))
        seen = np.zeros((len(tokens), member.shape[1]), bool)
        np.put_along_axis(seen, goes, True, 1)
        seen[np.arange(len(tokens)), source] = False
        visits.append(seen.sum(1).mean())
    return float(np.mean(visits))
