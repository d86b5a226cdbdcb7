"""One owner for each expert: replicas' gradients go home to the primary, its new weights come back.

Collective over the group of the layer; which rows travel follows from the placement alone. S rows of this rank.
"""

from __future__ import annotations

import torch

from ray_ep.collective import Group
from ray_ep.placement import Placement


class ReplicaExchange:
    """Traffic between primaries and replicas of one layer, from one rank's side."""

    def __init__(self, placement: Placement, layer: int, group: Group, device: torch.device | str = "cpu"):
        self.group = group
        held = [placement.experts_of(layer, r) for r in range(group.size)]
        owner = placement.owner[layer]
        mine, me = held[group.rank], group.rank
        # Rows of mine that go to each owner, and rows of mine (as owner) that each rank's replicas answer to,
        # both in ascending expert order, so that the two sides agree without a word.
        replica_rows = [sorted(i for i, e in enumerate(mine) if owner[e] == r != me) for r in range(group.size)]
        owned_rows = [[mine.index(e) for e in held[r] if owner[e] == me] if r != me else [] for r in range(group.size)]
        # As indices where the weights are: a list would travel there at every use.
        self.replica_rows = [torch.tensor(rows, dtype=torch.int64, device=device) for rows in replica_rows]
        self.owned_rows = [torch.tensor(rows, dtype=torch.int64, device=device) for rows in owned_rows]
        self.any = any(owner[e] != r for r in range(group.size) for e in held[r])

    def sum_to_owner(self, rows: torch.Tensor) -> None:
        """rows [S, D] of gradients: add replicas' rows to the primaries', ranks in ascending order. In place."""
        if not self.any:
            return
        received = self._move(rows, self.replica_rows, self.owned_rows)
        start = 0
        for mine in self.owned_rows:
            rows[mine] += received[start : start + len(mine)]
            start += len(mine)

    def send_to_replicas(self, rows: torch.Tensor) -> None:
        """rows [S, D] of weights: overwrite replicas' rows with the primaries'. In place."""
        if not self.any:
            return
        received = self._move(rows, self.owned_rows, self.replica_rows)
        rows[torch.cat(self.replica_rows)] = received

    def _move(self, rows: torch.Tensor, give: list[torch.Tensor], take: list[torch.Tensor]) -> torch.Tensor:
        sent = rows[torch.cat(give)].contiguous()
        received = rows.new_empty(sum(len(part) for part in take), rows.shape[1])
        self.group.all_to_all(received, sent, [len(p) for p in take], [len(p) for p in give])
        return received
