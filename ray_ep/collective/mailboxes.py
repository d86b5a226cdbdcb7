"""Memory that ranks of one host share: what would go over loopback sockets is copied there and read there.

Each rank owns an anonymous file (memfd) with a box for every reader and parity; who may read it opens it through /proc,
so that nothing has a name and nothing outlives the processes. Behind the boxes lies what it lends: read where it was
written. When a box or a loan is full, or read, is told by the group that these ranks are in, not here. Imports errors
and torch; no Ray.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import weakref
from pathlib import Path

import torch

from ray_ep.errors import GroupError

BOX = 1 << 36
"""Bytes of the file for one box, or for all loans: addresses, not memory, which only what was written takes."""

PAGE = 1 << 16
"""Bytes of a mapping at first; it grows by powers of two."""

FACTS = 4
"""int64 numbers that a rank tells about its file."""

_HEAD = 1 << 24
"""Bytes of addresses before the boxes: the token, counters, and where loans to each reader lie."""
_COUNTERS, _PLACES = 8, 64
"""int64 numbers there: where a rank's counters begin and where its places do."""

PLACES = 1 << 9
"""Places that a reader has: that of a loan is taken again by the one that begins so many later."""

_FREE = 2
"""References to a storage that nobody uses: its owner's tensor and the wrapper that we count through."""


class Mailboxes:
    """The boxes of one rank.

    Args:
        size: ranks of the group.
        boxes: of each reader.
    """

    def __init__(self, size: int, boxes: int):
        self._boxes, self._token = boxes, secrets.randbits(62)
        self._files: dict[int, int] = {}  # by owner, -1: one's own
        self._maps: dict[tuple[int, int, int], torch.Tensor] = {}
        fd = os.memfd_create("ray_ep", os.MFD_CLOEXEC)
        self._files[-1] = fd
        self._loans = BOX * (1 + size * boxes)  # where they begin
        os.ftruncate(fd, self._loans + BOX)
        os.pwrite(fd, self._token.to_bytes(8, "little"), 0)
        self._lent: list[torch.Tensor] = []
        self._lent_bytes = 0
        self._own = mmap.mmap(fd, BOX, offset=self._loans)
        self._theirs = {-1: _tensor(self._own)}  # loans of each owner
        self._heads = {-1: _head(fd)}
        self._processes: dict[int, select.poll] = {}  # readable once the process of an owner is gone
        self._pidfds: list[int] = []
        weakref.finalize(self, _close, self._files, self._pidfds)  # of a group that nobody closes, too

    def facts(self) -> torch.Tensor:
        """int64 [FACTS]: where this rank is and how to open its file."""
        return torch.tensor([_where(), os.getpid(), self._files[-1], self._token])

    def open(self, owner: int, facts: torch.Tensor) -> bool:
        """Open a rank's file by what it told; False if it is on another host, or out of reach."""
        where, pid, fd, token = facts.tolist()
        if where != _where():
            return False
        try:
            theirs = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if os.pread(theirs, 8, 0) != token.to_bytes(8, "little"):  # the same number in another container
                raise OSError
            loans = mmap.mmap(theirs, BOX, offset=self._loans)
            self._heads[owner] = _head(theirs)
        except OSError:
            os.close(theirs)
            return False
        self._watch(owner, pid)
        self._files[owner], self._theirs[owner] = theirs, _tensor(loans)
        return True

    def box(self, owner: int, reader: int, number: int, size: int) -> torch.Tensor:
        """uint8 [size]: the start of an owner's (-1: one's own) box `number` for a reader."""
        key = (owner, reader, number)
        here = self._maps.get(key)
        if here is None or len(here) < size:
            length = max(PAGE, 1 << (size - 1).bit_length())
            at = BOX * (1 + reader * self._boxes + number)
            here = _tensor(mmap.mmap(self._files[owner], length, offset=at))
            self._maps[key] = here
        return here[:size]

    def lend(self, size: int) -> torch.Tensor:
        """uint8 [size], unwritten, that others can read at `place`; taken back once nothing here refers to it."""
        free = [b for b in self._lent if is_free(b)]
        fits = [b for b in free if len(b) >= size]
        if not fits:
            for b in free:  # too small: their memory goes back, not their addresses
                self._own.madvise(mmap.MADV_REMOVE, self.place(b), len(b))
            length = max(PAGE, 1 << (size - 1).bit_length())
            fits = [_tensor(self._own, length, self._lent_bytes)]
            self._lent_bytes += length
            self._lent += fits
        return min(fits, key=len)[:size]

    def place(self, lent: torch.Tensor) -> int:
        """Where others read what `lend` gave, or a part of it."""
        at = lent.data_ptr() - self._theirs[-1].data_ptr()
        if not 0 <= at <= self._lent_bytes - len(lent):
            raise GroupError("begin_loan: the message does not lie in memory from the group's `take`")
        return at

    def read(self, owner: int, place: int, size: int) -> torch.Tensor:
        """uint8 [size] of what an owner lent."""
        return self._theirs[owner][place : place + size]

    def counters(self, owner: int) -> memoryview:
        """int64 numbers of an owner (-1: one's own) that it raises and others read."""
        return self._heads[owner][_COUNTERS:_PLACES:8]  # each in a cache line of its own

    def tell_place(self, reader: int, number: int, place: int) -> None:
        """Say to a reader where loan `number` lies."""
        self._heads[-1][_PLACES + reader * PLACES + number % PLACES] = place

    def read_place(self, owner: int, reader: int, number: int) -> int:
        """What an owner said."""
        return int(self._heads[owner][_PLACES + reader * PLACES + number % PLACES])

    def watches(self, owner: int) -> bool:
        """Whether `gone` can tell."""
        return owner in self._processes

    def gone(self, owner: int) -> bool:
        """Whether the process of an owner has ended, also as a zombie."""
        return bool(self._processes[owner].poll(0))

    def _watch(self, owner: int, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except (AttributeError, OSError):  # a kernel before 5.3
            return
        self._pidfds.append(fd)
        self._processes[owner] = select.poll()
        self._processes[owner].register(fd, select.POLLIN)

    def close(self) -> None:
        """Let go of all files; memory goes with its last user."""
        self._maps.clear()
        self._heads.clear()
        self._processes.clear()
        self._theirs.clear()
        self._lent.clear()
        _close(self._files, self._pidfds)


def _close(files: dict[int, int], pidfds: list[int]) -> None:
    while files:
        os.close(files.popitem()[1])
    while pidfds:
        os.close(pidfds.pop())


def _head(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, _HEAD)).cast("B").cast("q")


def _tensor(memory: mmap.mmap, count: int = -1, offset: int = 0) -> torch.Tensor:
    with torch.inference_mode(False):  # in it, what is made could be written only there
        return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=offset)


def is_free(buffer: torch.Tensor) -> bool:
    """Whether nothing else refers to a buffer's storage: no view, no graph, no NumPy array."""
    return bool(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) <= _FREE)


def _where() -> int:
    """Equal for processes that one loopback device joins: the same kernel, and the same network namespace in it."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hash((int(kernel.replace("-", ""), 16), os.stat("/proc/self/ns/net").st_ino)) & (2**62 - 1)
