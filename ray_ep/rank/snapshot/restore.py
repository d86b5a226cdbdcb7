"""A rank goes back to a snapshot: its own rows, those of the wards that it comes to own, and what every rank has.

Nothing travels: whoever comes to own an expert has a copy. The group was formed anew before. L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ray_ep.errors import PlacementError
from ray_ep.moe import Rows
from ray_ep.placement import Placement, Topology
from ray_ep.rank.handover import hand_over
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.snapshots import Snapshot
from ray_ep.rank.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Rewind:
    """What all ranks go back to, and go on with.

    Args:
        key: of the snapshot. taken: placement under which it was taken.
        placement, topology: of the ranks of the new epoch; each owner of an expert was that in `taken`, or keeps the
            one that was.
        lost: by keeper, a rank of the new epoch, the ranks of the snapshot's epoch that are gone: their routing
            statistics count as its own from now on.
        fresh: ranks that came after the snapshot: they own nothing, and are given what every rank has.
    """

    key: Key
    taken: Placement
    placement: Placement
    topology: Topology
    lost: Mapping[int, Collection[int]]
    fresh: tuple[int, ...] = ()


def restore(trainer: Trainer, snapshot: Snapshot | None, to: Rewind) -> None:
    """Go back to a snapshot and on over the group of a new epoch (collective over it, between steps).

    After an error weights are of no step: what was not done may be done again, with this snapshot or another.

    Args:
        snapshot: that of `to.key`; None on ranks that are fresh.

    Raises:
        PlacementError: a copy that this rank needs is not here. GroupError: a peer is gone.
    """
    rank, rows = trainer.group.rank, dict[tuple[int, int], Rows]()
    if snapshot is not None:
        rows = rows_for(snapshot, to.taken, to.placement, rank)
        snapshot.dense.put_back(trainer.optimizer)
        _count(trainer, snapshot, to.lost.get(rank, ()))
    if to.fresh:
        hand_over(trainer, to.fresh)
    trainer.regroup(to.placement, to.topology, rows)
    trainer.went_back()


def rows_for(snapshot: Snapshot, taken: Placement, placement: Placement, rank: int) -> dict[tuple[int, int], Rows]:
    """Rows [kinds, ...] of each (layer, expert) that rank owns under `placement`, from the copies that are here.

    Raises:
        PlacementError: one of them is in no copy here.
    """
    found: dict[tuple[int, int], Rows] = {}
    for layer in range(placement.num_layers):
        for expert in placement.experts_of(layer, rank):
            if placement.owner[layer, expert] != rank:
                continue
            owner = int(taken.owner[layer, expert])
            copy = snapshot.own if owner == snapshot.rank else snapshot.wards.get(owner)
            if copy is None:
                raise PlacementError(
                    f"rank {rank} has no copy of expert {expert} in layer {layer} after step {snapshot.key.step}: rank "
                    f"{owner} owned it then, this one has copies of {[snapshot.rank, *snapshot.wards]}"
                )
            found[layer, expert] = copy.rows_of(layer, expert)
    return found


@torch.no_grad()
def _count(trainer: Trainer, snapshot: Snapshot, lost: Collection[int]) -> None:
    """Routing statistics are as they were; the reservoir of recent tokens is left: it may hold a repeated one twice."""
    for name, then in snapshot.own.counted():
        getattr(trainer.ep.counters, name).copy_(then)
    for rank in lost:
        for name, then in snapshot.wards[rank].counted():
            getattr(trainer.ep.counters, name).add_(then.to(trainer.device))
