"""Memory of a rank's host: what snapshots take there. Pure. R ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_ep.placement.keepers import NOBODY, keepers
from ray_ep.placement.placement import Placement

HELD = 2
"""Copies of one state that are held at once: the newest whole one, and the one on its way."""


def state_bytes(kind: str, beta1: float) -> int:
    """Of one parameter where it is updated: a float32 master, and as many moments as the optimizer `optim` keeps."""
    return 4 * (1 + (2 if kind == "adamw" else int(beta1 > 0)))


@dataclass(frozen=True, slots=True)
class SnapshotMemory:
    """Whether a run takes snapshots, and what each rank copies of the dense part.

    Args:
        taken: snapshot.every is not 0. alone: a rank without others takes them, too, since they go to disk.
        dense_bytes: float32 masters and moments of the dense part, which every rank has; None: not known, not counted.
    """

    taken: bool = True
    alone: bool = False
    dense_bytes: float | None = None

    def most(self, placement: Placement, node_of: Sequence[int], expert_bytes: float) -> float:
        """Bytes that they take at most of the rank that holds most: of its own state and of what it keeps for others.

        Args:
            node_of: [R] node of each rank.
            expert_bytes: masters and moments of one expert, of as many layers as one of `placement` stands for.
        """
        ranks = placement.num_ranks
        if not self.taken or (ranks < 2 and not self.alone):
            return 0.0
        owned = np.bincount(placement.owner.ravel(), minlength=ranks)  # [R]
        held = owned.copy()
        for ward, keeper in enumerate(keepers(node_of)):
            if keeper != NOBODY:
                held[keeper] += owned[ward]
        return HELD * (float(held.max()) * expert_bytes + (self.dense_bytes or 0.0))
