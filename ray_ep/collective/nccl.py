"""NCCL through cupy.cuda.nccl: exchanges on a stream of their own, straight from and into torch's memory.

Not run on a GPU yet. CuPy is imported when a group is made. Imports group.py and device.py; no Ray.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from ray_ep.collective.cupy_nccl import communicator, library, reduction_type
from ray_ep.collective.device import ABORT_S, Limit, check_sizes, cuda_device, ended, here, in_time, is_soon, writable
from ray_ep.collective.group import SLICE, SplittableGroup, check_partner, same_color, split_key
from ray_ep.errors import GroupError


@dataclass(frozen=True, slots=True)
class Enqueued:
    """One call on its way: events on the side stream.

    Args:
        began: only where the time counts. limit: None: that of the group's calls.
    """

    done: torch.cuda.Event
    began: torch.cuda.Event | None
    limit: Limit | None


class NcclGroup(SplittableGroup):
    """One NCCL communicator behind the `Group` interface.

    A call returns once its work is enqueued: on a side stream, after all that the current stream holds and before all
    that it will hold. So tensors must be in use on the current stream (as fresh ones are), and calls from several
    streams of one thread keep the order in which they were made. Tensors elsewhere than on the device, or not
    contiguous, are copied there and back; from the CPU that is a host sync.

    A watchdog ends the group, and with it every kernel that waits for a dead peer, when a call takes longer than
    `timeout_s`, a message longer than its own limit (by up to half a second), or NCCL reports an error; the host learns
    of it at its next call or `wait`, and a host that reads a result is released. `seconds` is measured by
    events on the device and lacks what has not ended yet. Under CUDA graph capture use capture_error_mode
    "thread_local", since the watchdog queries events meanwhile; captured calls are not watched.

    Must be closed: it is not collected before.

    Args:
        api: the module cupy.cuda.nccl.
        communicator: an NcclCommunicator of these ranks on `device`.
        store: where the members of subgroups meet.
    """

    def __init__(
        self,
        api: Any,
        communicator: Any,
        store: Store,
        rank: int,
        size: int,
        epoch: int,
        device: torch.device,
        timeout_s: float,
    ):
        super().__init__(rank, size, epoch, timeout_s)
        self.device = device
        self._nccl, self._communicator, self._store = api, communicator, store
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._token = torch.zeros(1, device=device)  # what barriers reduce
        self._calling = threading.RLock()  # held inside calls of the communicator: abort frees it
        self._counting, self._ending = threading.Lock(), threading.Lock()
        self._why = ""  # why the group ended
        self._pending: deque[Enqueued] = deque()
        self._last: Enqueued | None = None
        # Since when a thread is inside a call of the communicator, and how long it may be there.
        self._entered: tuple[float, Limit | None] | None = None
        self._seconds = 0.0
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name=f"nccl-watchdog-{rank}", daemon=True).start()

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """Device time from a call's turn on the side stream to its end, waiting for peers included; no host sync."""
        self._drain()
        return self._seconds

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        self._check()
        check_sizes(output, input, output_sizes, input_sizes, self.size)
        with writable(output, self.device, self.wait, fill=False) as buffer:
            self._exchange(buffer, here(input, self.device), output_sizes, input_sizes)

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        mine = here(input, self.device)
        output = mine.new_empty(self.size, *mine.shape)
        self._launch(
            lambda stream: self._communicator.allGather(
                mine.data_ptr(), output.data_ptr(), n_bytes(mine), self._nccl.NCCL_UINT8, stream
            ),
            timed=True,
        )
        if input.device != self.device:
            self.wait()
        return output.to(input.device)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        dtype = reduction_type(self._nccl, tensor.dtype)
        operation = {"sum": self._nccl.NCCL_SUM, "max": self._nccl.NCCL_MAX}[op]
        with writable(tensor, self.device, self.wait) as buffer:
            at = buffer.data_ptr()
            self._launch(lambda stream: self._communicator.allReduce(at, at, buffer.numel(), dtype, operation, stream))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        with writable(tensor, self.device, self.wait) as buffer:
            at, count, byte = buffer.data_ptr(), n_bytes(buffer), self._nccl.NCCL_UINT8
            self._launch(lambda stream: self._communicator.broadcast(at, at, count, byte, source, stream))

    def barrier(self) -> None:
        self.all_reduce(self._token)
        self.wait()

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        check_partner(to, self)
        limit = Limit.of_message(to, self.timeout_s if limit_s is None else limit_s, sent=True)
        mine = here(tensor, self.device)
        at, count, byte = mine.data_ptr(), n_bytes(mine), self._nccl.NCCL_UINT8
        self._launch(lambda stream: self._communicator.send(at, count, byte, to, stream), limit=limit)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        check_partner(source, self)
        limit = Limit.of_message(source, self.timeout_s if limit_s is None else limit_s, sent=False)
        with writable(tensor, self.device, self.wait, fill=False) as buffer:
            at, count, byte = buffer.data_ptr(), n_bytes(buffer), self._nccl.NCCL_UINT8
            self._launch(lambda stream: self._communicator.recv(at, count, byte, source, stream), limit=limit)

    def wait(self) -> None:
        self._check()
        last, limit = self._last, Limit.of_call(self.timeout_s)
        if last is not None and not is_soon(lambda: self._is_done(last), self._check, limit.seconds):
            self._fail(limit.words)
        self._check()  # an abort ends what was enqueued, too

    def abort(self) -> None:
        self._fail("aborted")

    def _free(self) -> None:
        """Abort, since a polite destroy waits for peers; what is enqueued gets a second to end."""
        limit = time.monotonic() + 1.0
        while not self._why and self._last is not None and not self._is_done(self._last):
            if time.monotonic() > limit:
                break
            time.sleep(0.001)
        self._fail("closed")

    def _exchange(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        """All-to-all of contiguous tensors on the device."""
        row = math.prod(input.shape[1:]) * input.element_size()  # bytes
        api, communicator, byte = self._nccl, self._communicator, self._nccl.NCCL_UINT8
        sends = spans(input_sizes, row, input.data_ptr(), self.rank)
        receives = spans(output_sizes, row, output.data_ptr(), self.rank)
        kept = input_sizes[self.rank]
        source, target = sum(input_sizes[: self.rank]), sum(output_sizes[: self.rank])

        def call(stream: int) -> None:
            if sends or receives:
                api.groupStart()
                try:
                    for peer, at, count in sends:
                        communicator.send(at, count, byte, peer, stream)
                    for peer, at, count in receives:
                        communicator.recv(at, count, byte, peer, stream)
                finally:
                    api.groupEnd()
            if kept:  # on the current stream, beside the exchange
                output[target : target + kept].copy_(input[source : source + kept])

        self._launch(call, timed=True)

    def _launch(self, call: Callable[[int], None], timed: bool = False, limit: Limit | None = None) -> None:
        """Enqueue on the side stream: after what the current stream holds, before what comes next there."""
        self._check()
        try:
            with torch.cuda.device(self.device):
                current = torch.cuda.current_stream()
                capturing = torch.cuda.is_current_stream_capturing()
                began = torch.cuda.Event(enable_timing=True) if timed and not capturing else None  # type: ignore[no-untyped-call]
                done = torch.cuda.Event(enable_timing=began is not None)  # type: ignore[no-untyped-call]
                with self._calling:
                    self._check()
                    self._entered = time.monotonic(), limit  # NCCL connects at the first of a kind: the host waits
                    self._communicator.check_async_error()
                    self._stream.wait_stream(current)
                    if began is not None:
                        began.record(self._stream)
                    call(self._stream.cuda_stream)
                    done.record(self._stream)
                    self._entered = None
                current.wait_event(done)
        except (RuntimeError, KeyError) as e:  # KeyError: a status that CuPy has no name for
            self._entered = None
            self._fail(f"a peer is gone: {str(e).splitlines()[0]}")
            self._check()
        if not capturing:
            self._last = Enqueued(done, began, limit)
            self._pending.append(self._last)

    def _is_done(self, enqueued: Enqueued) -> bool:
        try:
            return bool(enqueued.done.query())  # type: ignore[no-untyped-call]
        except RuntimeError as e:  # the device itself has failed
            self._fail(str(e).splitlines()[0])
            return True

    def _check(self) -> None:
        if self._why:
            raise ended(self.rank, self.epoch, self._why, self.timeout_s)

    def _fail(self, why: str) -> None:
        """End the group, once; whoever waits in it is released."""
        with self._ending:
            if self._why:
                return
            self._why = why
        self._stopped.set()
        super().abort()  # the subgroups

        def end() -> None:
            torch.cuda.set_device(self.device)  # of this thread
            # A thread inside a call may be connecting: that is over in a moment, or NCCL's abort must end it.
            free = self._calling.acquire(timeout=1.0)
            try:
                self._communicator.abort()
            finally:
                if free:
                    self._calling.release()

        with contextlib.suppress(GroupError, RuntimeError):
            in_time(end, ABORT_S, "abort of an NCCL communicator")

    def _watch(self) -> None:
        """The watchdog: ends the group when its oldest call has been under way for too long or NCCL has an error."""
        torch.cuda.set_device(self.device)  # of this thread
        oldest, since = None, time.monotonic()
        while not self._stopped.wait(SLICE.total_seconds()):
            now, first, entered = time.monotonic(), self._drain(), self._entered
            if first is not oldest:
                oldest, since = first, now
            under_way = [] if first is None else [(since, first.limit)]
            for began, limit in under_way if entered is None else [*under_way, entered]:
                limit = limit or Limit.of_call(self.timeout_s)
                if now - began > limit.seconds:
                    self._fail(limit.words)
            if error := self._error():
                self._fail(f"a peer is gone: {error}")

    def _error(self) -> str:
        """What NCCL has found to be wrong meanwhile; nothing while a thread is in a call, which learns of it there."""
        if not self._calling.acquire(blocking=False):
            return ""
        try:
            if not self._why:
                self._communicator.check_async_error()
        except (RuntimeError, KeyError) as e:
            return str(e).splitlines()[0]
        finally:
            self._calling.release()
        return ""

    def _drain(self) -> Enqueued | None:
        """Drop the calls that have ended and add up their time; returns the oldest that has not."""
        with self._counting:
            while self._pending and self._is_done(self._pending[0]):
                enqueued = self._pending.popleft()
                if enqueued.began is not None and not self._why:
                    self._seconds += enqueued.began.elapsed_time(enqueued.done) / 1e3
            return self._pending[0] if self._pending else None

    def _form(self, colors: list[int]) -> NcclGroup:
        members = same_color(colors, self.rank)
        place = PrefixStore(split_key(self, colors), self._store)
        return _join(
            place, members.index(self.rank), len(members), self.epoch, self.device, self.timeout_s,
            lambda: bool(self._why),
        )  # fmt: skip

    def _warm(self) -> None:
        # Send and receive connect each pair by itself, apart from the rings of the reductions.
        def connect() -> None:
            torch.cuda.set_device(self.device)  # of this thread
            ones = torch.ones(self.size, device=self.device)
            self.all_to_all(torch.empty_like(ones), ones, [1] * self.size, [1] * self.size)
            self.barrier()

        what = f"rank {self.rank}: connecting the group of epoch {self.epoch}"
        try:
            in_time(connect, self.timeout_s, what, lambda: bool(self._why))
        except GroupError as e:
            self._fail(str(e))
            raise


def nccl(
    store: Store,
    rank: int,
    size: int,
    epoch: int = 0,
    device: torch.device | str | int | None = None,
    timeout_s: float = 300.0,
    limit_s: float | None = None,
) -> NcclGroup:
    """A group with an NCCL communicator of its own; all ranks call it, and it is warm when it returns.

    Args:
        store: where rank 0 leaves the communicator's id for the others.
        limit_s: of forming the group; None: `timeout_s`, that of a call.
        device: this rank's CUDA device; None: the current one. Two ranks on one device are refused by NCCL.

    Raises:
        BadInput: no CUDA device, CuPy is not installed, or it finds no NCCL.
        GroupError: the peers did not come within the limit, or NCCL refused.
    """
    place = PrefixStore(f"epoch-{epoch}", store)
    group = _join(place, rank, size, epoch, cuda_device(device), limit_s or timeout_s, lambda: False)
    group._warm()
    group.timeout_s = timeout_s
    return group


def spans(sizes: Sequence[int], row: int, start: int, rank: int) -> list[tuple[int, int, int]]:
    """(peer, address, bytes) of the parts of a rank-major tensor that travel: neither empty ones nor one's own.

    Args:
        sizes: [R] rows of each rank; row: bytes of one; start: address of the first; rank: oneself.
    """
    ends = list(accumulate(sizes))
    return [
        (peer, start + (end - size) * row, size * row)
        for peer, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size * row and peer != rank
    ]


def n_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a contiguous tensor."""
    return tensor.numel() * tensor.element_size()


def _join(
    store: Store,
    rank: int,
    size: int,
    epoch: int,
    device: torch.device,
    timeout_s: float,
    is_aborted: Callable[[], bool],
) -> NcclGroup:
    """Meet the other ranks in the store and make the communicator; not warm yet."""
    api = library()

    def connect() -> Any:
        torch.cuda.set_device(device)  # of this thread: the communicator is for the device that is current
        torch.zeros(1, device=device)  # and there is a context on it
        if rank == 0:
            store.set("nccl-id", bytes(b & 0xFF for b in api.get_unique_id()).hex())
        else:
            store.wait(["nccl-id"], timedelta(seconds=timeout_s))
        return communicator(api, size, bytes.fromhex(store.get("nccl-id").decode()), rank)

    what = f"rank {rank}: joining the NCCL group of epoch {epoch}"
    try:
        made = in_time(connect, timeout_s, what, is_aborted)
    except RuntimeError as e:
        raise GroupError(f"{what}: {str(e).splitlines()[0]}") from None
    return NcclGroup(api, made, store, rank, size, epoch, device, timeout_s)
