"""Groups of ranks: the interface, and the group of one rank.

No autograd here (that is ray_ep.moe), no Ray (that is ray_backend.py). Imports errors and torch.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

from ray_ep.errors import BadInput, GroupError

SLICE = timedelta(milliseconds=200)
"""Length of one wait; after it the abort flag is looked at, for gloo's own abort releases nobody (measured)."""


class Group(ABC):
    """An ordered set of ranks of one epoch that exchange tensors in lockstep.

    Every member must make the same calls in the same order. A call raises `GroupError` when a peer died, the time limit
    passed or `abort` was called; the group is then unusable, its members form another.
    """

    rank: int
    size: int
    epoch: int
    members: list[int]
    """Ranks in the group that this one was split from; 0, 1, ... if it was not."""
    seconds: float = 0.0
    """Time spent in `all_to_all` and `all_gather` so far, waiting for peers included."""

    @abstractmethod
    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        """Send the input's rows [sum(input_sizes), ...] to the ranks in order; receive [sum(output_sizes), ...]."""

    def take(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        """Unwritten memory for a message of `begin_loan`, with the dtype and on the device of `like`."""
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def begin_loan(
        self, message: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        """An all_to_all that other calls may follow before it ends, and whose receivers only read.

        What is returned ends it, called once, between the same calls on every rank: the rows of each rank, maybe in
        that rank's own memory. They are good until their reader begins another call, and longer only while their
        sender keeps `message`, as it is.

        Args:
            message: uint8 [sum(input_sizes), bytes] from `take`.

        Raises:
            GroupError: as any call; the message is not from `take`, or the 512th loan before this is not ended.
        """
        out = self.take(sum(output_sizes), *message.shape[1:], like=message)
        self.all_to_all(out, message, output_sizes, input_sizes)
        return lambda: list(out.split_with_sizes(list(output_sizes)))

    def standing(self) -> str:
        """How far each rank is, for people, where the group knows; "": it does not. Any thread may ask, at any time."""
        return ""

    @abstractmethod
    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        """[...] of every rank (same shape) -> [size, ...]."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        """In place; op is sum or max. The result is bit-identical on every rank."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """In place, from the source rank."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        """A message to another rank, which calls `receive`; the others take no part. The tensor may be changed then.

        Args:
            limit_s: seconds that the message may take; None: those of any call. Where calls return before their work
                is done, the limit ends the group beside it, and the next call or `wait` says so.

        Raises:
            BadInput: `to` is not another rank of the group.
            GroupError: as any call; the message was not taken within the limit, and the partner is named.
        """

    @abstractmethod
    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        """Counterpart of `send`, in place: same size, same dtype."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called."""

    @abstractmethod
    def split(self, color: int) -> Group:
        """Divide the group (collective over all of it): ranks that give the same color form a group of their own.

        Ranks of the new group follow the order of this one's; `members` tells who they are here. A subgroup is aborted
        and closed with the group that it came from. It may be used between calls of that group in any order on which
        its own members agree; the ranks outside need not know.

        Raises:
            GroupError: a peer died or the group was aborted meanwhile.
        """

    @abstractmethod
    def abort(self) -> None:
        """Release this rank's waiting calls, in subgroups too, with GroupError.

        Safe from another thread; not collective.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the group and its subgroups; not collective."""

    def wait(self) -> None:  # noqa: B027
        """Return once the results of all calls so far are there; call it before the host reads one.

        Only groups on a device return from a call before that: reading (`tolist`, `item`) then waits, too, but cannot
        be released with an error when a peer is dead.

        Raises:
            GroupError: as any call.
        """


class SplittableGroup(Group):
    """What groups over a library share: how they are split, and that subgroups go with their parent."""

    def __init__(self, rank: int, size: int, epoch: int, timeout_s: float):
        self.rank, self.size, self.epoch, self.timeout_s = rank, size, epoch, timeout_s
        self.members = list(range(size))
        self.splits = 0  # so far: tells the rendezvous of one split from that of the next
        self.on_close: Callable[[], None] = lambda: None  # called by `close`, once
        self._aborted = threading.Event()
        self._closing = threading.Lock()  # taken once, for ever
        self._subgroups: list[SplittableGroup] = []

    @abstractmethod
    def _form(self, colors: list[int]) -> SplittableGroup:
        """A new group of the ranks with this rank's color, not warm yet; every rank calls it with the same colors."""

    def _warm(self) -> None:
        """Connect now: a group that connects at its first use may hang when memory is short."""
        self.barrier()

    def split(self, color: int) -> Group:
        colors = self.all_gather(torch.tensor([color])).flatten().tolist()
        self.splits += 1
        group = self._form(colors)
        group.members = same_color(colors, self.rank)
        self._subgroups.append(group)
        if self._aborted.is_set():  # while it was being formed
            group.abort()
        group._warm()
        return group

    def abort(self) -> None:
        self._aborted.set()
        for group in self._subgroups:
            group.abort()

    def close(self) -> None:
        if not self._closing.acquire(blocking=False):
            return
        for group in self._subgroups:
            group.close()
        self._subgroups = []
        self._free()
        done, self.on_close = self.on_close, lambda: None  # it may hold on to the library's group
        done()

    def _free(self) -> None:
        """Give back what the library holds; called once."""
        self._aborted.set()

    def _check(self) -> None:
        if self._aborted.is_set():
            raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} is closed or aborted")


class SoloGroup(Group):
    """The group of one rank: every exchange is a copy."""

    def __init__(self, epoch: int = 0):
        self.rank, self.size, self.epoch, self.members = 0, 1, epoch, [0]

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        output.copy_(input)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        return input[None].clone()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        pass

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        pass

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        check_partner(to, self)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        check_partner(source, self)

    def barrier(self) -> None:
        pass

    def split(self, color: int) -> Group:
        return self

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_partner(partner: int, group: Group) -> None:
    """Raise BadInput unless `partner` is another rank of the group."""
    if partner == group.rank or not 0 <= partner < group.size:
        allowed = ", ".join(str(r) for r in range(group.size) if r != group.rank) or "none: it is alone"
        raise BadInput(f"rank {group.rank}: a message to or from rank {partner}; allowed are {allowed}")


def same_color(colors: list[int], rank: int) -> list[int]:
    """Ranks that have the color of `rank`, ascending; colors [size] of all ranks."""
    return [r for r, color in enumerate(colors) if color == colors[rank]]


def split_key(parent: SplittableGroup, colors: list[int]) -> str:
    """Where in their parent's store the members of a subgroup meet: unlike for every other split and color."""
    return f"split-{parent.splits}-{colors[parent.rank]}"
