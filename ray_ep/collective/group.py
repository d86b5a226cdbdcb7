"""Groups of ranks: the interface, and its implementation over torch process groups.

No autograd here (that is ray_ep.moe), no Ray (that is ray_backend.py). Imports errors and torch.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.errors import GroupError

SLICE = timedelta(milliseconds=200)
"""How long one wait lasts before the abort flag is looked at: gloo's own abort releases nobody (measured)."""


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

    def begin_all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], None]:
        """`all_to_all` that other calls may follow before it ends; what is returned ends it, called once.

        Until then the tensors are the group's. Groups that cannot do better end it at once.
        """
        self.all_to_all(output, input, output_sizes, input_sizes)
        return lambda: None

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
        self._aborted = threading.Event()
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
        self._aborted.set()
        for group in self._subgroups:
            group.close()
        self._subgroups = []

    def _check(self) -> None:
        if self._aborted.is_set():
            raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} is closed or aborted")


class TorchGroup(SplittableGroup):
    """A torch ProcessGroup behind the `Group` interface.

    Args:
        process_group: ProcessGroupGloo, or torch's default group.
        timeout_s: a collective that takes longer raises GroupError.
        on_close: called once by `close`.
        form: makes the new group of a split from this one and every rank's color; None: it cannot be split.
    """

    def __init__(
        self,
        process_group: Any,
        rank: int,
        size: int,
        epoch: int = 0,
        timeout_s: float = 300.0,
        on_close: Callable[[], None] = lambda: None,
        form: Callable[[TorchGroup, list[int]], TorchGroup] | None = None,
    ):
        super().__init__(rank, size, epoch, timeout_s)
        self._pg, self._on_close, self._make = process_group, on_close, form

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        start = time.perf_counter()
        self._run(lambda: self._pg.alltoall_base(output, input, list(output_sizes), list(input_sizes)))
        self.seconds += time.perf_counter() - start

    def begin_all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], None]:
        started: list[Any] = []
        start = lambda: self._pg.alltoall_base(output, input, list(output_sizes), list(input_sizes))  # noqa: E731
        self._run(start, started.append)

        def end() -> None:
            began = time.perf_counter()
            self._run(started.pop)
            self.seconds += time.perf_counter() - began

        return end

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        output = input.new_empty(self.size, *input.shape)
        self._run(lambda: self._pg.allgather([list(output.unbind())], [input.contiguous()]))
        self.seconds += time.perf_counter() - start
        return output

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        self._run(lambda: self._pg.allreduce([tensor], options))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._run(lambda: self._pg.broadcast([tensor], options))

    def barrier(self) -> None:
        self._run(lambda: self._pg.barrier(dist.BarrierOptions()))

    def close(self) -> None:
        super().close()
        self._on_close()
        self._pg, self._on_close = None, lambda: None

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        """Point to point; returns when the tensor may be changed.

        gloo closes the connection when a wait for a single message runs out, so this waits once, not in slices: for
        `limit_s` (None: the group's time limit), after which the group is unusable. An abort is seen only then.
        """
        self._run(lambda: self._pg.send([tensor], to, 0), lambda work: self._finish_message(work, limit_s))

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        """Counterpart of `send`, in place."""
        self._run(lambda: self._pg.recv([tensor], source, 0), lambda work: self._finish_message(work, limit_s))

    def _form(self, colors: list[int]) -> TorchGroup:
        if self._make is None:
            raise GroupError(f"rank {self.rank}: this group cannot be split: split the one that it came from")
        return self._make(self, colors)

    def _run(self, start: Callable[[], Any], finish: Callable[[Any], None] | None = None) -> None:
        """Start a call and finish it (None: as a collective); every failure becomes GroupError, at this one place."""
        self._check()
        try:
            (finish or self._finish)(start())
        except RuntimeError as e:
            self._aborted.set()
            raise GroupError(
                f"rank {self.rank}: a peer of epoch {self.epoch} is gone: {str(e).splitlines()[0]}"
            ) from None

    def _finish_message(self, work: Any, limit_s: float | None) -> None:
        """Wait for a started message, once."""
        work.wait(timedelta(seconds=self.timeout_s if limit_s is None else limit_s))

    def _finish(self, work: Any) -> None:
        """Wait for a started collective in slices."""
        limit = time.monotonic() + self.timeout_s
        while True:
            try:
                work.wait(SLICE)
                return
            except RuntimeError as e:
                if "imed out" not in str(e):
                    raise
                if work.is_completed():  # it ended between the slice's end and here: this wait says how
                    work.wait()
                    return
            if self._aborted.is_set():
                raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} was aborted")
            if time.monotonic() > limit:
                self._aborted.set()
                raise GroupError(
                    f"rank {self.rank}: no answer from the peers of epoch {self.epoch} in {self.timeout_s:g} s"
                )


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

    def barrier(self) -> None:
        pass

    def split(self, color: int) -> Group:
        return self

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def from_torch(timeout_s: float = 300.0) -> Group:
    """The default torch process group (as torchrun makes it) as a `Group`.

    Raises:
        GroupError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise GroupError(
            "no torch process group: call torch.distributed.init_process_group first (or run under torchrun)"
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    if "nccl" in dist.get_backend():
        from ray_ep.collective.torch_nccl import TorchNcclGroup  # it builds on this module

        return TorchNcclGroup(dist.group.WORLD, rank, size, timeout_s=timeout_s, form=_new_group)
    return TorchGroup(dist.group.WORLD, rank, size, timeout_s=timeout_s, form=_new_group)


def _new_group(parent: TorchGroup, colors: list[int]) -> TorchGroup:
    """A subgroup of torch's default group: torch wants every rank to make every group, in the same order."""
    limit = timedelta(seconds=parent.timeout_s)
    made = {
        color: dist.new_group([r for r, c in enumerate(colors) if c == color], timeout=limit)
        for color in sorted(set(colors))
    }
    own, members = made[colors[parent.rank]], same_color(colors, parent.rank)
    return type(parent)(
        own, members.index(parent.rank), len(members), parent.epoch, parent.timeout_s,
        on_close=lambda: dist.destroy_process_group(own),
    )  # fmt: skip


def gloo(
    store: dist.Store, rank: int, size: int, epoch: int = 0, host: str | None = None, timeout_s: float = 300.0
) -> TorchGroup:
    """A gloo group of its own over a rendezvous store; all ranks call it, and it is warm when it returns.

    Args:
        host: address of this rank's network interface; None: what the host name resolves to.
    """
    group = _gloo(dist.PrefixStore(f"epoch-{epoch}", store), rank, size, epoch, host, timeout_s)
    group._warm()
    return group


def _gloo(store: dist.Store, rank: int, size: int, epoch: int, host: str | None, timeout_s: float) -> TorchGroup:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    device = (
        dist.ProcessGroupGloo.create_device(hostname=host) if host else dist.ProcessGroupGloo.create_default_device()
    )
    options._devices = [device]
    try:
        process_group = dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as e:
        raise GroupError(f"rank {rank}: could not join the group of epoch {epoch}: {str(e).splitlines()[0]}") from None

    def form(parent: TorchGroup, colors: list[int]) -> TorchGroup:
        members = same_color(colors, parent.rank)
        place = dist.PrefixStore(split_key(parent, colors), store)
        return _gloo(place, members.index(parent.rank), len(members), parent.epoch, host, parent.timeout_s)

    return TorchGroup(process_group, rank, size, epoch, timeout_s, form=form)


def same_color(colors: list[int], rank: int) -> list[int]:
    """Ranks that have the color of `rank`, ascending; colors [size] of all ranks."""
    return [r for r, color in enumerate(colors) if color == colors[rank]]


def split_key(parent: SplittableGroup, colors: list[int]) -> str:
    """Where in their parent's store the members of a subgroup meet: unlike for every other split and color."""
    return f"split-{parent.splits}-{colors[parent.rank]}"
