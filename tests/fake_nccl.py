"""A cupy.cuda.nccl that is not there: its names, over threads of one process, with its orders, ends and errors.

Calls return at once, like NCCL's: what they do is done by whichever rank comes last, and until then the `Ticket` on the
stream has not ended. Addresses are those that `Tensor.data_ptr` gave out, so memory is checked as any other use of it
(fake_streams.py). An aborted communicator lets go of everybody that waits in it; that of a lost rank tells its peers by
`check_async_error`, and their calls hang until they abort, as kernels do.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.fake_streams import HERE, Stream, Ticket, Use, spot

available = True
NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_INT64, NCCL_FLOAT16, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_BFLOAT16 = (
    0, 1, 2, 4, 6, 7, 8, 9,
)  # fmt: skip
NCCL_SUM, NCCL_MAX = 0, 2
_TYPES = {
    NCCL_INT8: torch.int8, NCCL_UINT8: torch.uint8, NCCL_INT32: torch.int32, NCCL_INT64: torch.int64,
    NCCL_FLOAT16: torch.float16, NCCL_FLOAT32: torch.float32, NCCL_FLOAT64: torch.float64,
    NCCL_BFLOAT16: torch.bfloat16,
}  # fmt: skip


class NcclError(RuntimeError):
    """As CuPy's."""


@dataclass(eq=False)
class Call:
    """What one rank has asked for, as one kernel: a collective, or some sends and receives."""

    communicator: NcclCommunicator
    stream: Stream
    reads: list[tuple[int, int]]  # address, bytes
    writes: list[tuple[int, int]]
    what: tuple = ()  # that of a collective must be equal on all ranks
    peer: int = -1  # of a message
    ticket: Ticket = None
    kept: list = field(default_factory=list)  # storages, until the call has ended
    data: bytes = b""  # what is read


class World:
    """The ranks of one communicator, and what has come of their calls so far."""

    def __init__(self, size):
        self.size, self.lock, self.ready = size, threading.RLock(), threading.Barrier(size)
        self.sent, self.wanted = defaultdict(deque), defaultdict(deque)  # (from, to) -> calls
        self.rounds = defaultdict(dict)  # number of a collective -> rank -> call
        self.open = defaultdict(list)  # rank -> tickets
        self.lost = set()

    def post(self, call):
        """A call's data is there; whoever completes something does it."""
        me = call.communicator.rank
        with self.lock:
            if call.what:
                calls = self.rounds[call.communicator.next_round()]
                calls[me] = call
                if len(calls) == self.size:
                    self.finish([calls[r] for r in range(self.size)])
                return
            pair = (call.peer, me) if call.writes else (me, call.peer)
            (self.wanted if call.writes else self.sent)[pair].append(call)
            while self.sent[pair] and self.wanted[pair]:
                source, target = self.sent[pair].popleft(), self.wanted[pair].popleft()
                write(target, source.data)
                source.ticket.end_part()
                target.ticket.end_part()

    def finish(self, calls):
        """A collective to which all ranks have come."""
        kinds = [call.what for call in calls]
        assert len(set(kinds)) == 1, f"ranks call different collectives: {kinds}"
        kind, *detail = kinds[0]
        if kind == "broadcast":
            results = [calls[detail[-1]].data] * self.size
        elif kind == "allGather":
            results = [b"".join(call.data for call in calls)] * self.size
        else:
            results = [reduced([call.data for call in calls], *detail)] * self.size
        for call, result in zip(calls, results, strict=True):
            write(call, result)
            call.ticket.end_part()

    def leave(self, rank):
        """Nobody waits any more in this rank's calls."""
        with self.lock:
            for queues in (self.sent, self.wanted):
                for calls in queues.values():
                    kept = [call for call in calls if call.communicator.rank != rank]
                    calls.clear()
                    calls.extend(kept)
            for ticket in self.open.pop(rank, ()):
                ticket.end()


class NcclCommunicator:
    """One rank's communicator; blocks until all ranks are there."""

    worlds, lock = {}, threading.Lock()
    calls = Counter()
    """How often each call was made so far, by all."""

    def __init__(self, ndev, commId, rank):
        if not isinstance(commId, bytes):
            raise TypeError("CuPy 14 takes bytes")
        assert len(commId) == 128
        assert 0 <= rank < ndev
        with self.lock:
            self.world = self.worlds.setdefault(commId, World(ndev))
        self.rank, self.dead, self._rounds = rank, False, itertools.count()
        try:
            self.world.ready.wait(60)
        except threading.BrokenBarrierError:
            raise NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error") from None

    def next_round(self):
        return next(self._rounds)

    def check_async_error(self):
        if self.dead:
            raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage")
        if self.world.lost - {self.rank}:
            raise NcclError("NCCL_ERROR_REMOTE_ERROR: remote process exited or there was a network error")

    def abort(self):
        self.dead = True
        self.world.leave(self.rank)

    def send(self, sendbuf, count, datatype, peer, stream):
        size = count * _TYPES[datatype].itemsize
        self._ask("send", stream, reads=[(sendbuf, size)], peer=peer)

    def recv(self, recvbuf, count, datatype, peer, stream):
        size = count * _TYPES[datatype].itemsize
        self._ask("recv", stream, writes=[(recvbuf, size)], peer=peer)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        size = count * _TYPES[datatype].itemsize
        what = ("allGather", count, datatype)
        self._ask("allGather", stream, [(sendbuf, size)], [(recvbuf, size * self.world.size)], what)

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        size = count * _TYPES[datatype].itemsize
        self._ask("allReduce", stream, [(sendbuf, size)], [(recvbuf, size)], ("allReduce", datatype, op))

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        size = count * _TYPES[datatype].itemsize
        self._ask("broadcast", stream, [(sendbuff, size)], [(recvbuff, size)], ("broadcast", count, datatype, root))

    def _ask(self, kind, stream, reads=(), writes=(), what=(), peer=-1):
        if self.dead:
            raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage")
        assert peer < self.world.size
        NcclCommunicator.calls[kind] += 1
        grouped = getattr(_LOCAL, "calls", None)
        calls = [] if grouped is None else grouped
        calls.append(Call(self, Stream.of(stream), list(reads), list(writes), what, peer))
        if grouped is None:
            _enqueue(calls)


_LOCAL = threading.local()


def get_unique_id():
    return os.urandom(128)


def groupStart():
    _LOCAL.calls = []


def groupEnd():
    calls, _LOCAL.calls = _LOCAL.calls, None
    _enqueue(calls)


def lose(communicator):
    """The rank's process is killed: peers hear of it, and what waits for it has no end but an abort."""
    communicator.world.lost.add(communicator.rank)
    communicator.world.ready.abort()


def _enqueue(calls):
    """One kernel a stream: all of its memory is read now, when what comes before it is done, and written at its end."""
    for stream in dict.fromkeys(call.stream for call in calls):
        mine = [call for call in calls if call.stream is stream]
        stream.after(HERE.host.clock)
        stream.settle()
        tick, ticket = stream.tick(), Ticket(len(mine))
        for call in mine:
            name, call.ticket = call.what[0] if call.what else "a message", ticket
            call.kept = [used(at, size, stream, tick, name, False) for at, size in call.reads]
            call.kept += [used(at, size, stream, tick, name, True) for at, size in call.writes]
            call.data = b"".join(ctypes.string_at(at, size) for at, size in call.reads)
            call.communicator.world.open[call.communicator.rank].append(ticket)
        stream.tickets.append(ticket)
        for call in mine:
            call.communicator.world.post(call)
            if call.communicator.dead:  # aborted meanwhile
                ticket.end()


def used(at, size, stream, tick, name, writes):
    """The storage of an address, now in use; a read and a write of one call are no race with each other."""
    assert isinstance(at, int), f"an address is a number, not {type(at)}"
    if not size:
        return None
    storage = HERE.process.storage_at(at, size)
    start = at - storage.data_ptr()
    storage.fake_memory.use(name, Use(stream, tick, writes, start, start + size, spot()))
    return storage


def write(call, data):
    """The result of a call into its memory; what nobody waits for any more stays away."""
    ((at, size),) = call.writes
    assert len(data) == size, f"a message of {len(data)} bytes for one of {size}"
    if not call.ticket.ended:
        ctypes.memmove(at, data, size)


def reduced(parts, datatype, op):
    """Sum or maximum, ranks in ascending order, of half precision in float32."""
    if not parts[0]:
        return b""
    assert len({len(p) for p in parts}) == 1, "ranks reduce tensors of different sizes"
    with _disable_current_modes():
        dtype = _TYPES[datatype]
        tensors = [torch.frombuffer(bytearray(p), dtype=dtype) for p in parts]
        wide = torch.stack([t.float() if dtype.itemsize == 2 and dtype.is_floating_point else t for t in tensors])
        out = wide.sum(0, dtype=wide.dtype) if op == NCCL_SUM else wide.amax(0)
        return out.to(dtype).view(torch.uint8).numpy().tobytes()
