"""Memory that ranks of one host share: what would go over loopback sockets is copied there and read there.

Each rank owns an anonymous file (memfd) with a box for every reader and parity; who may read it opens it through /proc,
so that nothing has a name and nothing outlives the processes. When a box is full or read again is told by the group
that these ranks are in, not here. Imports torch; no Ray.
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path

import torch

BOX = 1 << 36
"""Bytes of the file for one box: an address, not memory, which only what was written takes."""

PAGE = 1 << 16
"""A mapping grows by powers of two from here."""

FACTS = 4
"""int64 numbers that a rank tells about its file."""


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
        os.ftruncate(fd, BOX * (1 + size * boxes))
        os.pwrite(fd, self._token.to_bytes(8, "little"), 0)

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
        if os.pread(theirs, 8, 0) != token.to_bytes(8, "little"):  # the same number in another container
            os.close(theirs)
            return False
        self._files[owner] = theirs
        return True

    def box(self, owner: int, reader: int, number: int, size: int) -> torch.Tensor:
        """uint8 [size]: the start of an owner's (-1: one's own) box `number` for a reader."""
        key = (owner, reader, number)
        here = self._maps.get(key)
        if here is None or len(here) < size:
            length = max(PAGE, 1 << (size - 1).bit_length())
            at = BOX * (1 + reader * self._boxes + number)
            here = torch.frombuffer(mmap.mmap(self._files[owner], length, offset=at), dtype=torch.uint8)
            self._maps[key] = here
        return here[:size]

    def close(self) -> None:
        """Let go of all files; memory goes with its last user."""
        self._maps.clear()
        while self._files:
            os.close(self._files.popitem()[1])


def _where() -> int:
    """Equal for processes that one loopback device joins: the same kernel, and the same network namespace in it."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hash((int(kernel.replace("-", ""), 16), os.stat("/proc/self/ns/net").st_ino)) & (2**62 - 1)
