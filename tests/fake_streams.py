"""Streams and events of a CUDA that is not there: what a GPU would have to do before what.

The CPU computes everything at once, in the order in which the host asks for it. A GPU does it later, and streams run
beside each other; so each stream carries a vector clock (how much of each stream it comes after), and a use of memory
that nothing orders after another stream's write (or, to overwrite, after its reads) raises `Race`. What NCCL has under
way is a `Ticket`: whatever comes after it waits for it, as a kernel would.

A thread has a place (`HERE`): its process (a rank), its stream and its host, which is a timeline as well.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_NUMBERS = itertools.count(1)


class Race(Exception):
    """A use of memory that no stream order, event or wait puts after the one before it."""


class Ticket:
    """One NCCL call of one rank that is under way: it has ended when all its parts have."""

    def __init__(self, parts: int):
        self.parts, self.at, self._ended, self._lock = parts, 0.0, threading.Event(), threading.Lock()
        if not parts:
            self.end()

    def end_part(self):
        with self._lock:
            self.parts -= 1
        if self.parts <= 0:
            self.end()

    def end(self):
        if not self._ended.is_set():
            self.at = time.perf_counter()
            self._ended.set()

    @property
    def ended(self):
        return self._ended.is_set()

    def wait(self):
        assert self._ended.wait(100), "an NCCL call without an end: nobody has aborted it"


class Timeline:
    """A stream or a host thread: things happen on it one after the other.

    Attributes:
        clock: timeline -> how many of its ticks come before what happens here next.
        tickets: NCCL calls that must have ended before.
        freed: memory that was allocated here and is free again, since the last allocation.
    """

    def __init__(self, name):
        self.name, self.clock, self.tickets, self.freed = name, {}, [], []

    def __repr__(self):
        return self.name

    def after(self, clock, tickets=()):
        """What happens here next comes after all that `clock` counts."""
        for line, tick in clock.items():
            if self.clock.get(line, 0) < tick:
                self.clock[line] = tick
        self.tickets += [t for t in tickets if not t.ended and t not in self.tickets]

    def is_after(self, clock):
        """Whether what happens here next comes after all that `clock` counts."""
        return all(self.clock.get(line, 0) >= tick for line, tick in clock.items())

    def tick(self):
        """Something happens: its number on this timeline."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def settle(self):
        """Let everything before have happened."""
        for ticket in self.tickets:
            ticket.wait()
        self.tickets.clear()

    def allocate(self):
        """Memory is taken: a GPU may give what was freed on this stream, which others must have done with."""
        freed, self.freed = self.freed, []
        for memory in freed:
            for use in memory.uses:
                if type(use.line) is Stream and use.line not in memory.kept_for and not use.before(self):
                    raise Race(
                        f"{self} takes memory again that was freed while {use.line} still uses it ({use}), without "
                        "record_stream"
                    )


@dataclass(frozen=True, slots=True)
class Use:
    """One read or write of the bytes from `start` to `end` of a storage."""

    line: Timeline
    tick: int
    writes: bool
    start: int
    end: int
    where: str

    def __str__(self):
        return f"{'written' if self.writes else 'read'} at {self.where}"

    def before(self, line):
        """Whether what happens on a timeline next comes after this."""
        return line.clock.get(self.line, 0) >= self.tick


class Memory:
    """What is known of one storage that is on the device, or pinned. Lies on the storage, and dies with it.

    Attributes:
        line: on which it was allocated. pinned: it is the host's.
        uses: those that nothing has made irrelevant since. kept_for: streams of `record_stream`.
    """

    __slots__ = ("kept_for", "line", "pinned", "uses")

    def __init__(self, line, size, pinned=False, where="?"):
        self.line, self.pinned, self.kept_for = line, pinned, set()
        self.uses = [Use(line, line.tick(), True, 0, size, where)]

    def __del__(self):
        if not self.pinned:
            self.line.freed.append(self)

    def use(self, what, new):
        """Something reads or writes this memory; raises Race."""
        kept = []
        for use in self.uses:
            meets = use.start < new.end and new.start < use.end and (use.writes or new.writes)
            if meets and not use.before(new.line):
                raise Race(
                    f"{what} on {new.line} {'writes' if new.writes else 'reads'} memory that {use.line} has {use}: "
                    f"nothing orders the two ({new.where})"
                )
            inside = new.start <= use.start and use.end <= new.end
            if not (inside and (new.writes or (use.line is new.line and not use.writes))):
                kept.append(use)
        self.uses = [*kept, new]


def memory_of(tensor):
    """What is known of a tensor's memory; None: it is ordinary memory of the host, or there is no tensor."""
    return None if tensor is None else getattr(tensor.untyped_storage(), "fake_memory", None)


def touch(tensor, what, line, tick, writes, where):
    """A use of a tensor's memory, if anything is known of it; a view is the bytes from its first to its last."""
    memory = memory_of(tensor)
    if memory is not None and tensor.numel():
        steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.storage_offset() * tensor.itemsize
        memory.use(what, Use(line, tick, writes, start, start + (steps + 1) * tensor.itemsize, where))


class Process:
    """One rank: in reality a process of its own, here a thread and those that it starts."""

    def __init__(self):
        self.default = Stream()
        self.default.cuda_stream = 0
        self.others = weakref.WeakSet()
        self.debug = ""  # of torch.cuda.set_sync_debug_mode
        self._given = {}  # address -> weak reference to the storage there, of those that were asked for it

    def streams(self):
        return [self.default, *self.others]

    def give_address(self, storage):
        """The storage's address leaves Python, so a library may use it."""
        self._given[storage.data_ptr()] = weakref.ref(storage)

    def storage_at(self, at, size):
        """The storage that holds these bytes."""
        for start, reference in list(self._given.items()):
            storage = reference()
            if storage is None:
                del self._given[start]
            elif start <= at and at + size <= start + storage.nbytes():
                assert getattr(storage, "fake_memory", None), "NCCL was given memory that is not on the device"
                return storage
        raise AssertionError(f"NCCL was given {size} bytes at {at:#x}, where no tensor lives")


class Here(threading.local):
    """Where this thread is.

    Attributes:
        process: of this rank. stream: the current one. host: this thread itself.
        switches: (autograd's sequence number, stream) whenever the stream changed: a node of the graph goes back on the
            stream that it came on.
        syncs: where host syncs are noted, or None.
        fills: torch's engine makes zeros for a node on the device, for gradients that nobody gave.
    """

    def __init__(self):
        self.host = Timeline(f"host thread {threading.current_thread().name}")
        self.process = self.stream = self.syncs = None
        self.fills = False

    def enter(self, process):
        self.process, self.stream, self.switches = process, process.default, [(0, process.default)]

    def switch(self, stream):
        """Make it the current stream; returns the one until now."""
        before, self.stream = self.stream, stream
        self.switches.append((torch.autograd._get_sequence_nr(), stream))
        return before

    def launch(self):
        """Something is enqueued on the current stream: (stream, tick), all before it done."""
        self.stream.after(self.host.clock)
        self.stream.settle()
        return self.stream, self.stream.tick()

    def synchronise(self, kind, *streams):
        """The host waits for streams."""
        self.note(kind)
        for stream in streams:
            stream.settle()
            self.host.after(stream.clock)

    def note(self, kind):
        """The host waits; as torch's own debug mode does, warn or raise if it is on and nobody said synchronize."""
        if self.syncs is not None:
            self.syncs.append((kind, spot()))
        if self.process.debug and not kind.endswith("synchronize"):
            if self.process.debug == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


class Stream(Timeline):
    """torch.cuda.Stream."""

    by_number = weakref.WeakValueDictionary()

    def __init__(self, device=None, priority=0, **_):
        self.cuda_stream, self.priority = next(_NUMBERS), priority
        super().__init__(f"stream {self.cuda_stream}")
        self.device = torch.device("cuda", 0)
        self.by_number[self.cuda_stream] = self
        if HERE.process is not None:
            HERE.process.others.add(self)

    @classmethod
    def of(cls, number):
        """The stream that a library was given as a number."""
        assert isinstance(number, int), f"a stream's address is a number, not {type(number)}"
        return HERE.process.default if number == 0 else cls.by_number[number]

    def wait_stream(self, stream):
        self.after(HERE.host.clock)
        self.after(stream.clock, stream.tickets)

    def wait_event(self, event):
        self.after(event.clock, event.tickets)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def query(self):
        return all(t.ended for t in self.tickets)

    def synchronize(self):
        HERE.synchronise("stream.synchronize", self)


class Event:
    """torch.cuda.Event; at the first question it has not passed yet, unless the host knows that it has."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, **_):
        self.timing, self.clock, self.tickets, self.recorded, self.asked = enable_timing, {}, (), None, False

    def record(self, stream=None):
        stream = stream or HERE.stream
        stream.after(HERE.host.clock)
        self.clock, self.tickets = dict(stream.clock), tuple(stream.tickets)
        self.recorded, self.asked = time.perf_counter(), False

    def wait(self, stream=None):
        (stream or HERE.stream).wait_event(self)

    def query(self):
        if not all(t.ended for t in self.tickets):
            return False
        before, self.asked = self.asked, True
        if before or HERE.host.is_after(self.clock):
            HERE.host.after(self.clock)
            return True
        return False

    def synchronize(self):
        HERE.note("event.synchronize")
        for ticket in self.tickets:
            ticket.wait()
        self.asked = True
        HERE.host.after(self.clock)

    @property
    def at(self):
        return max([self.recorded, *(t.at for t in self.tickets)])

    def elapsed_time(self, end):
        """Milliseconds, of events that have passed."""
        if not (self.timing and end.timing and self.recorded is not None and end.recorded is not None):
            raise ValueError("both events must have been recorded, with enable_timing=True")
        if not (end.asked and all(t.ended for t in (*self.tickets, *end.tickets))):
            raise RuntimeError("CUDA error: device not ready")
        return (end.at - self.at) * 1e3


@contextmanager
def on(stream):
    """torch.cuda.stream."""
    if stream is None:
        yield
        return
    before = HERE.switch(stream)
    try:
        yield
    finally:
        HERE.switch(before)


def spot():
    """file:line of the nearest caller that is neither torch nor this simulator."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if ("/ray_ep/" in name or "/transformers/" in name or "/tests/" in name) and "/tests/fake_" not in name:
            for root in ("/site-packages/", "/tests/", "/ray_ep/"):
                name = name.rpartition(root)[2]
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


HERE = Here()
