"""The snapshots of one rank: its own copies, those of its wards, and the thread in which they travel beside the steps.

A group of their own carries them, so that no step waits for a message of theirs. Restoring is restore.py's, what is
written to disk on_disk.py's.
R ranks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ray_ep.collective import Group
from ray_ep.errors import GroupError
from ray_ep.moe import ExpertParallel
from ray_ep.placement.keepers import NOBODY, keepers
from ray_ep.rank.snapshot.copies import DenseCopy, Key, Layout, OwnedCopy
from ray_ep.rank.snapshot.on_disk import OnDisk, Shelf
from ray_ep.rank.step.optimizer import MasterOptimizer

PIECE = 16 << 20
"""Bytes of one message: with 1 MiB a snapshot took twice as long, with more the steps' messages wait longer."""


@dataclass(frozen=True, slots=True)
class Held:
    """Which snapshots one rank could give, newest last.

    Args:
        own: of its own state.
        wards: whole ones of others, by their rank in the snapshot's epoch.
    """

    own: tuple[Key, ...]
    wards: dict[int, tuple[Key, ...]]


@dataclass(slots=True)
class Snapshot:
    """All that one rank has of one snapshot.

    Args:
        rank: of this process in the snapshot's epoch.
    """

    key: Key
    rank: int
    own: OwnedCopy
    dense: DenseCopy
    wards: dict[int, OwnedCopy]  # by rank; those that have arrived whole


class Snapshots:
    """Takes snapshots between steps and sends them beside the next ones; keeps the newest whole one and what follows.

    Args:
        side: their group, with the ranks of the model's and in the same order. Tensors of the CPU.
    """

    def __init__(self, model: torch.nn.Module, ep: ExpertParallel, optimizer: MasterOptimizer, side: Group):
        self.model, self.ep, self.optimizer, self.side = model, ep, optimizer, side
        self._kept: list[Snapshot] = []  # oldest first
        self._free: dict[int, list[torch.Tensor]] = {}  # memory of copies that were dropped, by bytes
        self._lock = threading.Lock()
        self._sending: threading.Thread | None = None
        self._error = ""
        self._on_disk: OnDisk | None = None
        self._leave = threading.Event()  # end what is written to disk soon
        self._fault = ""  # why the last one is not on disk

    def take(self, step: int, node_of: list[int], shelf: Shelf | None = None) -> str:
        """Copy this rank's state after `step` steps and begin to send it to its keeper (collective, between steps).

        The one before has been sent when it returns: if that failed, or is still under way, this waits or fails.

        Args:
            node_of: [R] node of each rank.
            shelf: where it is written on disk, too, once it is whole.

        Returns:
            why the one before is not on disk, though it should be; "": it is, or somebody else says why not.

        Raises:
            GroupError: a peer is gone.
        """
        self.wait()
        if self._error:
            raise GroupError(self._error)
        rank, key = self.ep.group.rank, Key(self.ep.group.epoch, step)
        layouts = [Layout(self.ep, self.optimizer, self.ep.placement, r) for r in range(len(node_of))]
        own = self._new(key, layouts[rank])
        own.take(self.ep, self.optimizer)
        snapshot = Snapshot(key, rank, own, DenseCopy(self.model, self.optimizer), {})
        keeper_of = keepers(node_of)
        coming = {w: self._new(key, layouts[w]) for w, keeper in enumerate(keeper_of) if keeper == rank}
        with self._lock:
            self._kept.append(snapshot)
        if shelf is not None and (self._on_disk is None or self._on_disk.shelf.url != shelf.url):
            self._on_disk = OnDisk(shelf, self.side, self._leave)
        what = (snapshot, coming, keeper_of[rank], max(layout.size for layout in layouts), shelf is not None)
        work = threading.Thread(target=self._send, args=what, daemon=True, name=f"snapshot-{step}")
        fault, self._fault, self._sending = self._fault, "", work
        work.start()
        return fault

    def wait(self) -> None:
        """Until nothing is being sent."""
        if self._sending is not None:
            self._sending.join()
            self._sending = None

    def held(self) -> Held:
        """What this rank could give now."""
        with self._lock:
            kept = [(s.key, list(s.wards)) for s in self._kept]
        wards: dict[int, tuple[Key, ...]] = {}
        for key, ranks in kept:
            for rank in ranks:
                wards[rank] = (*wards.get(rank, ()), key)
        return Held(tuple(key for key, _ in kept), wards)

    def get(self, key: Key) -> Snapshot:
        """A snapshot that is held."""
        with self._lock:
            return next(s for s in self._kept if s.key == key)

    def regroup(self) -> None:
        """The group of before is gone: forget how sending ended in it. What has arrived stays."""
        self._leave.set()
        self.wait()
        self._leave.clear()
        self._error = ""

    def _send(self, snapshot: Snapshot, coming: dict[int, OwnedCopy], keeper: int, longest: int, to_disk: bool) -> None:
        try:
            for start in range(0, longest if keeper != NOBODY else 0, PIECE):
                self._piece(snapshot.own.data, coming, keeper, start)
            with self._lock:
                snapshot.wards = coming
            self.side.barrier()  # whoever leaves it knows that everybody has everything
            with self._lock:
                old, self._kept = [s for s in self._kept if s is not snapshot], [snapshot]
            for gone in old:
                self._drop(gone)
            if to_disk and self._on_disk is not None:
                self._fault = self._on_disk.write(snapshot.own, snapshot.dense, self.model, self.optimizer)
        except GroupError as e:
            self._error = f"a snapshot was not sent: {e}"

    def _piece(self, data: torch.Tensor, coming: dict[int, OwnedCopy], keeper: int, start: int) -> None:
        """One message of each rank to its keeper (collective over the group of snapshots)."""
        give, take = [0] * self.side.size, [0] * self.side.size
        mine = data[start : start + PIECE]
        give[keeper] = len(mine)
        parts = {w: copy.data[start : start + PIECE] for w, copy in sorted(coming.items())}
        for ward, part in parts.items():
            take[ward] = len(part)
        if len(parts) == 1:
            (into,) = parts.values()
        else:
            into = torch.empty(sum(take), dtype=torch.uint8)
        self.side.all_to_all(into, mine, take, give)
        if len(parts) > 1:
            at = 0
            for part in parts.values():
                part.copy_(into[at : at + len(part)])
                at += len(part)

    def _new(self, key: Key, layout: Layout) -> OwnedCopy:
        """A copy in memory that was used before, if there is some: fresh pages cost as much as the copy."""
        spare = self._free.get(layout.size)
        data = spare.pop() if spare else torch.empty(layout.size, dtype=torch.uint8)
        return OwnedCopy(key, layout, data)

    def _drop(self, snapshot: Snapshot) -> None:
        self._free.clear()  # of other sizes nothing will be needed again
        for copy in (snapshot.own, *snapshot.wards.values()):
            self._free.setdefault(copy.layout.size, []).append(copy.data)
