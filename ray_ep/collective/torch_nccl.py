"""torch's own NCCL process group as a `Group`: the second implementation, to compare with nccl.py.

Not run on a GPU yet. Imports torch_group.py and what that does, and device.py. torch kills a process whose collective
failed unless TORCH_NCCL_ASYNC_ERROR_HANDLING is 2 (or 0) when the group is made: whoever starts the ranks sets it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from ray_ep.collective.device import ABORT_S, Limit, cuda_device, ended, here, in_time, is_soon, writable
from ray_ep.collective.group import SLICE, check_partner, same_color, split_key
from ray_ep.collective.one_host import as_bytes
from ray_ep.collective.torch_group import TorchGroup
from ray_ep.errors import BadInput, GroupError


class TorchNcclGroup(TorchGroup):
    """ProcessGroupNCCL behind the `Group` interface: calls return when the work is in the stream's order.

    Tensors elsewhere than on the device are copied there and back, which is a host sync. `seconds` counts what the host
    spent in the calls only. A message is an all-to-all in which the two partners alone have rows, and alone take part:
    torch's own makes a communicator for the pair, and blocks the host until the partner comes, for longer than any
    limit. A thread watches messages: one that is late ends the group, within half a second after its limit.
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
        device: torch.device | None = None,
    ):
        super().__init__(process_group, rank, size, epoch, timeout_s, on_close, form)
        self.device = cuda_device(device)
        self._last: Any = None  # keeps the last result alive until the next call
        self._live = True
        self._why = ""  # why the group ended, if by itself
        self._messages: deque[tuple[Any, Limit]] = deque()  # on their way
        self._watcher: threading.Thread | None = None  # of messages; started at the first
        self._whole: ProcessGroup | None = None

    @property
    def process_group(self) -> ProcessGroup:
        """torch's group of the same ranks, always the same object, for libraries that want one.

        It goes over this group's communicator, which torch makes at the first collective.
        """
        if self._whole is None:
            kind = ProcessGroup.BackendType.NCCL
            self._whole = whole(self._pg, self.rank, self.size, self.device.type, kind)
        return self._whole

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        with writable(output, self.device, self.wait, fill=False) as buffer:
            super().all_to_all(buffer, here(input, self.device), output_sizes, input_sizes)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        mine = here(input, self.device)
        output = mine.new_empty(self.size, *mine.shape)
        self._run(lambda: self._pg._allgather_base(output.view(-1), mine.view(-1)))
        self.seconds += time.perf_counter() - start
        if input.device != self.device:
            self.wait()
        return output.to(input.device)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        with writable(tensor, self.device, self.wait) as buffer:
            super().all_reduce(buffer, op)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        with writable(tensor, self.device, self.wait) as buffer:
            super().broadcast(buffer, source)

    def barrier(self) -> None:
        # Not the process group's own: its wait cannot be aborted.
        super().all_reduce(torch.zeros(1, device=self.device))
        self.wait()

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        check_partner(to, self)
        mine = as_bytes(here(tensor, self.device))
        limit = Limit.of_message(to, self.timeout_s if limit_s is None else limit_s, sent=True)
        self._message(mine.new_empty(0), mine, to, limit)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        check_partner(source, self)
        limit = Limit.of_message(source, self.timeout_s if limit_s is None else limit_s, sent=False)
        with writable(tensor, self.device, self.wait, fill=False) as buffer:
            took = as_bytes(buffer)
            self._message(took, took.new_empty(0), source, limit)

    def _message(self, output: torch.Tensor, input: torch.Tensor, partner: int, limit: Limit) -> None:
        """uint8 [bytes] from or to the partner; the other one is empty."""
        sizes = [[len(x) if r == partner else 0 for r in range(self.size)] for x in (output, input)]

        def watched(work: Any) -> None:
            self._messages.append((work, limit))
            self._finish(work)

        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name=f"messages-{self.rank}", daemon=True)
            self._watcher.start()
        self._run(lambda: self._pg.alltoall_base(output, input, *sizes), watched)

    def _watch(self) -> None:
        """End the group when the oldest message has been the oldest for longer than its limit."""
        oldest, since = None, time.monotonic()
        while not self._aborted.wait(SLICE.total_seconds()):
            while self._messages and self._messages[0][0].is_completed():
                self._messages.popleft()
            first, now = self._messages[0] if self._messages else None, time.monotonic()
            if first is not oldest:
                oldest, since = first, now
            if first is not None and now - since > first[1].seconds:
                self._fail(first[1].words)

    def wait(self) -> None:
        self._check()
        work, self._last = self._last, None
        if work is None:
            return
        limit = Limit.of_call(self.timeout_s)
        if not is_soon(work.is_completed, self._check, limit.seconds):
            self._fail(limit.words)
        self._run(lambda: work)  # raises what torch's watchdog has found
        self._last = None

    def _fail(self, why: str) -> None:
        self._why = self._why or why
        self.abort()

    def _check(self) -> None:
        if self._why:
            raise ended(self.rank, self.epoch, self._why, self.timeout_s)
        super()._check()

    def abort(self) -> None:
        super().abort()
        live, self._live = self._live, False
        if live and self._pg is not None:
            end(self._pg)

    def _free(self) -> None:
        """What is enqueued gets a second to end. A group of torch's own stays as it is."""
        limit = time.monotonic() + 1.0
        while not self._aborted.is_set() and self._last is not None and not self._last.is_completed():
            if time.monotonic() > limit:
                break
            time.sleep(0.001)
        super()._free()
        self._whole = None

    def _warm(self) -> None:
        # Send and receive connect each pair by itself, apart from the rings of the reductions.
        def connect() -> None:
            torch.cuda.set_device(self.device)  # of this thread
            ones = torch.ones(self.size, device=self.device)
            self.all_to_all(torch.empty_like(ones), ones, [1] * self.size, [1] * self.size)
            self.barrier()

        what = f"rank {self.rank}: connecting the group of epoch {self.epoch}"
        try:
            in_time(connect, self.timeout_s, what, self._aborted.is_set)
        except GroupError as e:
            self._fail(str(e))
            raise

    def _finish(self, work: Any) -> None:
        """Order the current stream after the work; the host goes on."""
        work.wait()  # without a limit: with one it would be a host sync
        self._last = work


def torch_nccl(
    store: Store,
    rank: int,
    size: int,
    epoch: int = 0,
    device: torch.device | str | int | None = None,
    timeout_s: float = 300.0,
    limit_s: float | None = None,
) -> TorchNcclGroup:
    """A group of its own over torch's NCCL and a rendezvous store; all ranks call it, and it is warm when it returns.

    Args:
        device: this rank's CUDA device; None: the current one. Two ranks on one device are refused by NCCL.
        limit_s: of forming the group; None: `timeout_s`, that of a call.

    Raises:
        BadInput: no CUDA device, or torch was built without NCCL.
        GroupError: the peers did not come within the limit.
    """
    check_torch_nccl()
    limit_s = limit_s or timeout_s
    place = PrefixStore(f"epoch-{epoch}", store)
    group = _join(place, rank, size, epoch, cuda_device(device), limit_s)
    group._warm()
    group.timeout_s = timeout_s
    return group


def whole(backend: Any, rank: int, size: int, device: str, kind: Any) -> ProcessGroup:
    """A backend of torch's as a process group for tensors on `device`; `kind`: which it is. A group stays itself."""
    if isinstance(backend, ProcessGroup):
        return backend
    make: Any = ProcessGroup  # torch's stubs know only the one with a store
    group: ProcessGroup = make(rank, size)
    group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    return group


def check_torch_nccl() -> None:
    """Raise BadInput if this process cannot use torch's NCCL."""
    cuda_device(None)
    if not dist.is_nccl_available():
        raise BadInput(f"torch {torch.__version__} was built without NCCL")


def end(process_group: Any) -> None:
    """Abort: kernels that wait for a dead peer end only with the communicator; the abort itself may hang, too."""
    with contextlib.suppress(GroupError, RuntimeError):
        in_time(process_group.abort, ABORT_S, "abort of torch's NCCL group")


def _join(store: Store, rank: int, size: int, epoch: int, device: torch.device, timeout_s: float) -> TorchNcclGroup:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.is_high_priority_stream = True
    try:
        process_group = dist.ProcessGroupNCCL(store, rank, size, options)
    except RuntimeError as e:
        raise GroupError(f"rank {rank}: could not join the group of epoch {epoch}: {str(e).splitlines()[0]}") from None

    def form(parent: TorchGroup, colors: list[int]) -> TorchGroup:
        members = same_color(colors, parent.rank)
        place = PrefixStore(split_key(parent, colors), store)
        return _join(place, members.index(parent.rank), len(members), parent.epoch, device, parent.timeout_s)

    return TorchNcclGroup(
        process_group, rank, size, epoch, timeout_s, on_close=lambda: end(process_group), form=form, device=device
    )
