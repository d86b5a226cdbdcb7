"""A model goes on over the group of another epoch: rows are adopted, maps derived again, ranks compared.

Between steps. Moving experts is migrate.py's, forming the group ray_ep.collective's, who is a member the driver's.
L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from ray_ep.collective import Group
from ray_ep.errors import BadInput, ModelError, PlacementError
from ray_ep.moe.exchange.choose import ways_to_try
from ray_ep.moe.migrate import OwnedState, Rows, swap_rows, unapplied
from ray_ep.moe.parallelize import ExpertParallel
from ray_ep.placement import Placement, Topology

FIELDS = 24
"""Fields of the message in which ranks compare themselves: its length, which must be equal whatever it says."""


def regroup(
    model: Any,
    group: Group,
    placement: Placement,
    topology: Topology | None = None,
    *,
    kept: Mapping[tuple[int, int], Rows] | None = None,
    state: OwnedState | None = None,
    equal: Mapping[str, object] | None = None,
) -> None:
    """Go on over the group of a new epoch (collective over it, between steps): what else a model has stays as it is.

    What must be equal on all ranks is compared first, in the first collective of the group. Then each rank adopts the
    rows that it owns or holds under `placement`, without a word to others, and derives all else again. That placement
    is `old.among(origin, keepers)`; experts move to a better one by `apply_placement` afterwards.

    Args:
        group: formed under the new membership; `model.ray_ep.group` itself, if it was re-formed in place.
        placement: for its ranks.
        topology: links between them, with nodes; None: all on one node, links not measured.
        kept: rows [kinds, ...] float32, as `OwnedState.rows` gives them, of (layer, expert) that this rank comes to own
            without having done so, for a rank that went; what it has itself is replaced by them, too. Without `state`
            a rank that comes to own an expert needs a replica of it.
        state: what primaries keep beside compute weights.
        equal: what else must be equal on all ranks, by name: step, updates, ...

    Raises:
        PlacementError: ranks differ, and in what, or one of them lacks rows; on every rank, and all but the group is
            as it was. ModelError: gradients are present. GroupError: a peer is gone.
    """
    ep: ExpertParallel = model.ray_ep
    kept = kept or {}
    ep.group.use(group)
    problem = _problem(ep, placement, topology, kept, state)
    _compare(ep.group, {**_equal(ep, placement, topology, state), **(equal or {})}, problem)
    for index in range(len(ep.layers)):
        rows = {e: r for (layer, e), r in kept.items() if layer == index}
        swap_rows(ep, index, placement, {e: {n: r[0] for n, r in x.items()} for e, x in rows.items()}, rows, state)
    ep.regroup(group, placement, topology)
    (kind,), _ = ways_to_try(ep, (ep.exchange.kind,), 0)  # two levels may be one now
    ep.exchange_by(kind=kind)


def _problem(
    ep: ExpertParallel,
    placement: Placement,
    topology: Topology | None,
    kept: Mapping[tuple[int, int], Rows],
    state: OwnedState | None,
) -> BadInput | None:
    """Why this rank cannot go on with the placement."""
    have = (len(ep.layers), ep.num_experts, ep.group.size)
    want = (placement.num_layers, placement.num_experts, placement.num_ranks)
    if want != have or (topology is not None and topology.num_ranks != ep.group.size):
        links = "" if topology is None else f", the topology for {topology.num_ranks} ranks"
        return PlacementError(
            f"placement is for {want[0]} layers x {want[1]} experts on {want[2]} ranks{links}; the model has {have[0]} "
            f"MoE layers x {have[1]} experts and the group {have[2]} ranks"
        )
    if waiting := unapplied(ep, state):
        return ModelError(f"gradients are present ({waiting}): discard them before the group changes")
    for index, layer in enumerate(ep.layers):
        for e in placement.experts_of(index, ep.group.rank):
            owns = bool(placement.owner[index, e] == ep.group.rank)
            rows = layer.experts[: layer.owned] if owns and state is not None else layer.experts
            if e not in rows and (index, e) not in kept:
                what = "masters and moments" if e in layer.experts else "weights"
                return PlacementError(
                    f"rank {ep.group.rank} has no {what} of expert {e} in layer {index}, which the placement gives it: "
                    "hand them over as `kept`, or take a placement that leaves experts where they are (Placement.among)"
                )
    return _misfit(ep, kept, state)


def _misfit(
    ep: ExpertParallel, kept: Mapping[tuple[int, int], Rows], state: OwnedState | None
) -> PlacementError | None:
    """Why rows that were handed over cannot be taken on: they are of another model, or of before the first update."""
    for (index, e), rows in kept.items():
        kinds = state.kinds_of(index) if state is not None else {}
        for name, p in ep.parameters(index).items():
            have = tuple(rows[name].shape) if name in rows else ()
            want = (kinds.get(name, max(have[:1], default=1)), *p.shape[1:])
            if have != want:
                return PlacementError(
                    f"rank {ep.group.rank} was handed {name} of expert {e} in layer {index} with shape {list(have)}: "
                    f"expected {list(want)}, the weight and what an owner keeps beside it after so many updates"
                )
    return None


def _equal(
    ep: ExpertParallel, placement: Placement, topology: Topology | None, state: OwnedState | None
) -> dict[str, object]:
    """What must be equal on all ranks, by name: else results differ, or calls of the group do and all hang."""
    balancer = ep.balancer
    shapes = [(n, tuple(p.shape[1:]), str(p.dtype)) for i in range(len(ep.layers)) for n, p in ep.parameters(i).items()]
    return {
        "experts": shapes,
        "placement": placement.to_json(),
        "topology": None if topology is None else topology.to_json(),
        "exchange": ep.exchange,
        "balance": (balancer.mode, balancer.guest_mb, balancer.most),
        "kept state": None if state is None else [sorted(state.kinds_of(i).items()) for i in range(len(ep.layers))],
    }


def _compare(group: Group, equal: Mapping[str, object], problem: BadInput | None) -> None:
    """Raise on every rank if one has a problem, or they differ, and then in what (collective)."""
    names = sorted(equal)
    if len(names) > FIELDS - 2:
        raise BadInput(f"regroup: {len(names)} things to compare, at most {FIELDS - 2} are possible")
    mine = torch.zeros(FIELDS, dtype=torch.int64)
    values = [int(problem is not None), _digest(names), *(_digest(equal[n]) for n in names)]
    mine[: len(values)] = torch.tensor(values)
    everyone = group.all_gather(mine)
    group.wait()
    if problem is not None:
        raise problem
    refusing, fields = everyone[:, 0].tolist(), everyone[:, 1:].tolist()
    if any(refusing):
        raise PlacementError(f"rank {refusing.index(1)} cannot go on in epoch {group.epoch} (its own error says why)")
    if odd := next((r for r, row in enumerate(fields) if row != fields[0]), 0):
        differ = [i for i, (a, b) in enumerate(zip(fields[0], fields[odd], strict=True)) if a != b]
        what = "what they compare" if differ[0] == 0 else ", ".join(names[i - 1] for i in differ)
        raise PlacementError(f"ranks 0 and {odd} of epoch {group.epoch} differ in {what}: hand over what is the run's")


def _digest(value: object) -> int:
    return zlib.crc32(repr(value).encode())
