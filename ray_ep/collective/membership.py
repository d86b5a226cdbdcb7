"""Who is a member of an epoch: a frozen value, from which ranks, sizes and nodes are derived.

Pure. Forming the group of a membership is epoch_group.py's, deciding on one the driver's. Imports errors alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ray_ep.errors import GroupError


@dataclass(frozen=True, slots=True)
class Membership:
    """The members of one epoch; a member's rank is its position.

    Args:
        epoch: counts memberships of one run, from 0.
        members: [R] id of each rank's member, such as that of its actor; an id is never used for another one.
        node_of: [R] node of each rank, as `Topology.node_of` numbers them.

    Raises:
        GroupError: nobody, an id twice, a node too many or too few, a negative epoch.
    """

    epoch: int
    members: tuple[str, ...]
    node_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.epoch < 0 or not self.members or len(self.node_of) != len(self.members):
            raise GroupError(
                f"membership of epoch {self.epoch} with {len(self.members)} members on {len(self.node_of)} nodes: "
                "expected an epoch from 0, at least one member, and one node for each"
            )
        if len(set(self.members)) < len(self.members):
            twice = next(m for m in self.members if self.members.count(m) > 1)
            raise GroupError(f"membership of epoch {self.epoch}: member {twice} is in it twice")

    @property
    def size(self) -> int:
        """R, ranks."""
        return len(self.members)

    def rank_of(self, member: str) -> int:
        """Rank of a member; raises GroupError if it is none."""
        if member not in self.members:
            raise GroupError(f"{member} is no member of epoch {self.epoch}")
        return self.members.index(member)

    def next(self, gone: Collection[str] = (), come: Mapping[str, int] | None = None) -> Membership:
        """The membership after this one: who stays keeps the order, who comes is last.

        Args:
            gone: members that are in it no more.
            come: node of each new member, by id.

        Raises:
            GroupError: one that goes is no member, one that comes is or was just now, or nobody is left.
        """
        come = come or {}
        for member in gone:
            self.rank_of(member)
        if known := [m for m in come if m in self.members]:
            raise GroupError(f"{known[0]} was a member of epoch {self.epoch}: a new member needs an id of its own")
        stay = [(m, n) for m, n in zip(self.members, self.node_of, strict=True) if m not in gone] + list(come.items())
        return Membership(self.epoch + 1, tuple(m for m, _ in stay), tuple(n for _, n in stay))

    def origin(self, before: Membership) -> tuple[int, ...]:
        """[R] rank of each member in an earlier membership, -1 of one that is new; what `Placement.among` takes.

        Raises:
            GroupError: `before` is not of an earlier epoch.
        """
        if before.epoch >= self.epoch:
            raise GroupError(f"epoch {before.epoch} is not before epoch {self.epoch}")
        rank_of = {member: rank for rank, member in enumerate(before.members)}
        return tuple(rank_of.get(member, -1) for member in self.members)

    def fresh(self, before: Membership) -> tuple[int, ...]:
        """Ranks, ascending, whose members are not in an earlier membership."""
        return tuple(rank for rank, origin in enumerate(self.origin(before)) if origin < 0)

    def gone(self, before: Membership) -> tuple[int, ...]:
        """Ranks in an earlier membership, ascending, whose members are in this one no more."""
        stay = set(self.origin(before))
        return tuple(r for r in range(before.size) if r not in stay)
