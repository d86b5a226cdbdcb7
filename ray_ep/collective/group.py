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
    seconds: float = 0.0
    """Time spent in `all_to_all` and `all_gather` so far, waiting for peers included."""

    @abstractmethod
    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        """Send the input's rows [sum(input_sizes), ...] to the ranks in order; receive [sum(output_sizes), ...]."""

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
    def abort(self) -> None:
        """Release this rank's waiting calls with GroupError; safe from another thread; not collective."""

    @abstractmethod
    def close(self) -> None:
        """Free the group; not collective."""


class TorchGroup(Group):
    """A torch ProcessGroup behind the `Group` interface.

    Args:
        process_group: ProcessGroupGloo, or torch's default group.
        timeout_s: a collective that takes longer raises GroupError.
        on_close: called once by `close`.
    """

    def __init__(
        self,
        process_group: Any,
        rank: int,
        size: int,
        epoch: int = 0,
        timeout_s: float = 300.0,
        on_close: Callable[[], None] = lambda: None,
    ):
        self._pg, self.rank, self.size, self.epoch = process_group, rank, size, epoch
        self.timeout_s, self._on_close = timeout_s, on_close
        self._aborted = threading.Event()

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        start = time.perf_counter()
        self._run(lambda: self._pg.alltoall_base(output, input, list(output_sizes), list(input_sizes)))
        self.seconds += time.perf_counter() - start

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

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self._aborted.set()
        self._on_close()
        self._pg, self._on_close = None, lambda: None

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Point to point, for ray.util.collective's own interface."""
        self._run(lambda: self._pg.send([tensor], to, 0))

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Counterpart of `send`, in place."""
        self._run(lambda: self._pg.recv([tensor], source, 0))

    def _run(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait for it in slices; every failure becomes GroupError, at this one place."""
        if self._aborted.is_set():
            raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} is closed or aborted")
        limit = time.monotonic() + self.timeout_s
        try:
            work = start()
            while True:
                try:
                    work.wait(SLICE)
                    return
                except RuntimeError as e:
                    if "imed out" not in str(e) or work.is_completed():
                        raise
                if self._aborted.is_set():
                    raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} was aborted")
                if time.monotonic() > limit:
                    raise GroupError(
                        f"rank {self.rank}: no answer from the peers of epoch {self.epoch} in {self.timeout_s:g} s"
                    )
        except RuntimeError as e:
            self._aborted.set()
            raise GroupError(
                f"rank {self.rank}: a peer of epoch {self.epoch} is gone: {str(e).splitlines()[0]}"
            ) from None


class SoloGroup(Group):
    """The group of one rank: every exchange is a copy."""

    def __init__(self, epoch: int = 0):
        self.rank, self.size, self.epoch = 0, 1, epoch

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
    return TorchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), timeout_s=timeout_s)


def gloo(
    store: dist.Store, rank: int, size: int, epoch: int = 0, host: str | None = None, timeout_s: float = 300.0
) -> TorchGroup:
    """A gloo group of its own over a rendezvous store; all ranks call it, and it is warm when it returns.

    Args:
        host: address of this rank's network interface; None: what the host name resolves to.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    device = (
        dist.ProcessGroupGloo.create_device(hostname=host) if host else dist.ProcessGroupGloo.create_default_device()
    )
    options._devices = [device]
    try:
        process_group = dist.ProcessGroupGloo(dist.PrefixStore(f"epoch-{epoch}", store), rank, size, options)
    except RuntimeError as e:
        raise GroupError(f"rank {rank}: could not join the group of epoch {epoch}: {str(e).splitlines()[0]}") from None
    group = TorchGroup(process_group, rank, size, epoch, timeout_s)
    group.barrier()  # connects the pairs now: a group that connects at its first use may hang when memory is short
    return group
