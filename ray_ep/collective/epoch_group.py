"""The group that holders keep: one object, re-formed in place for every epoch, and let over to the transport in use.

It passes calls on; what they do is the groups' own. Imports group.py, parking.py, device.py, errors and torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from ray_ep.collective.device import in_time
from ray_ep.collective.group import Group
from ray_ep.collective.parking import CLOSE_S, park
from ray_ep.errors import GroupError

Maker = Callable[[], Group]
"""Forms one group with the other members; every wait in it is bounded."""


class EpochGroup(Group):
    """The group of the present epoch, over the transport in use.

    Layers, balancer, replicas and optimizer keep this object; `form` and `use` change what it stands for, between
    steps. rank, size, epoch, members and seconds are those of the present group. A call costs half a microsecond more
    than the group's own. What a call of an earlier epoch began (a loan) ends in that epoch's group, with GroupError.

    Attributes:
        transports: the groups of this epoch by name of their transport: the same ranks, all this object's to close.
    """

    def __init__(self, group: Group | None = None):
        self.rank, self.size, self.epoch, self.members = 0, 0, -1, []
        self.transports: dict[str, Group] = {}
        self._present: Group | None = None
        self._state = threading.Lock()  # of what `abort` reads from another thread
        self._forming: int | None = None  # epoch
        self._aborted = threading.Event()  # while it is being formed
        if group is not None:
            self.use(group)

    @staticmethod
    def of(group: Group) -> EpochGroup:
        """The group itself if it is one, else a new one that stands for it."""
        return group if isinstance(group, EpochGroup) else EpochGroup(group)

    @property
    def present(self) -> Group:
        """The group that calls go to.

        Raises:
            GroupError: none was formed, or the last `form` failed.
        """
        if self._present is None:
            raise GroupError(f"rank {self.rank}: no group was formed after epoch {self.epoch}")
        return self._present

    def use(self, group: Group) -> None:
        """Let calls go to `group` from now on (every rank calls it with the same); closes nothing."""
        group = group.present if isinstance(group, EpochGroup) else group
        with self._state:
            self._present = group
            self.rank, self.size, self.epoch, self.members = group.rank, group.size, group.epoch, group.members

    def sit(self, rank: int, size: int) -> None:
        """Be `rank` of `size` before any group is formed, for building a model; every call raises GroupError."""
        self.rank, self.size = rank, size

    def keep(self, transport: str) -> None:
        """Use one of the transports and leave the others."""
        self.use(self.transports[transport])
        for name in set(self.transports) - {transport}:
            park(self.transports.pop(name))

    def form(self, epoch: int, makers: Mapping[str, Maker], limit_s: float) -> None:
        """Leave the present group, parked, and form that of an epoch (collective over its members); the first is used.

        Args:
            makers: one for each transport, by name, in the same order on every rank.
            limit_s: time for each of them.

        Raises:
            GroupError: a peer did not come in time or died, or `abort` was called; there is no group then, and the
                next attempt is under another epoch.
        """
        with self._state:
            self._forming = epoch
            self._aborted.clear()
        self._leave(0.0)
        try:
            for name, make in makers.items():
                what = f"forming the group of epoch {epoch} over {name}"
                self.transports[name] = in_time(make, limit_s, what, self._aborted.is_set, late=park)
            self.use(next(iter(self.transports.values())))
        except BaseException:
            self._leave(0.0)
            raise
        finally:
            with self._state:
                self._forming = None
        if self._aborted.is_set():  # since the last look
            self.present.abort()

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        self.present.all_to_all(output, input, output_sizes, input_sizes)

    def take(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        return self.present.take(*shape, like=like)

    def begin_loan(
        self, message: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        return self.present.begin_loan(message, output_sizes, input_sizes)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        return self.present.all_gather(input)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        self.present.all_reduce(tensor, op)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        self.present.broadcast(tensor, source)

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        self.present.send(tensor, to, limit_s)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        self.present.receive(tensor, source, limit_s)

    def barrier(self) -> None:
        self.present.barrier()

    def split(self, color: int) -> Group:
        """As of a `Group`; the subgroup dies with this epoch."""
        return self.present.split(color)

    def wait(self) -> None:
        self.present.wait()

    def standing(self) -> str:
        present = self._present
        return "" if present is None else present.standing()

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """Of the present group, as it counts them."""
        return 0.0 if self._present is None else self._present.seconds

    def abort(self, epoch: int | None = None) -> None:
        """Release this rank from a call, also from `form`. Safe from another thread; not collective.

        Args:
            epoch: do so only if the group is of this epoch, or is being formed for it: an order that comes late does
                no harm to the next one. None: whatever it is.
        """
        with self._state:
            if self._forming is not None and epoch in (None, self._forming):
                self._aborted.set()
            groups = self._groups()
        for group in groups:
            if epoch in (None, group.epoch):  # one that is being formed over several transports has the first already
                group.abort()

    def close(self) -> None:
        """Leave all groups; returns within a second or so, whatever the peers do."""
        self._leave(CLOSE_S)

    def _leave(self, wait_s: float) -> None:
        with self._state:
            groups = self._groups()
            self.transports, self._present = {}, None
        for group in groups:
            park(group, wait_s)

    def _groups(self) -> list[Group]:
        """All that are this object's, each once."""
        present = [] if self._present is None else [self._present]
        return list(dict.fromkeys([*self.transports.values(), *present]))
