"""Collectives of ranks that all share memory: boxes and counters, no socket and no system call unless a rank is late.

A rank fills its boxes, then raises its counter to the number of the call; who reads a counter that is high enough finds
the boxes full. gloo took 1.3 ms more for each call of two ranks that compute in between: its threads have to be woken
on both sides (docs/notes/whole-steps.md). Imports group.py, mailboxes.py, errors and torch.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

import torch

from ray_ep.collective.group import SplittableGroup
from ray_ep.collective.mailboxes import PLACES, Mailboxes
from ray_ep.errors import GroupError, LateError

ORDERED = platform.machine() in ("x86_64", "AMD64")
"""Whether other processes see what a rank writes in the order in which it was written; elsewhere gloo tells them."""

CALLS, LOANS, ENDED, CLOSED = 0, 1, 2, 3
"""Counters of a rank: calls begun, loans begun, loans before the first not ended, 1 once it has closed its group."""

_SPINS = 1500
"""Looks at a counter before sleeping: some 100 us, less than it takes to fall asleep and be woken."""
_SLEEP_S, _LONG_S = 20e-6, 1e-3
"""Between two looks then, and after _LONG of them."""
_LONG = 2000
_LOOK_S = 0.01
"""How often it is looked whether the group was aborted or a process is gone."""

_PIECE = 1 << 20
"""Elements that are reduced at once: what the boxes must hold."""
_SMALL = 1 << 12
"""Elements up to which every rank adds all of them; of more each adds its share, and all take it from there."""


class OneHost:
    """Calls of one rank; every rank makes the same ones in the same order. Each waits for all ranks to begin it.

    So boxes of two calls in turn are enough: who begins a call has seen every rank begin the one before, and read the
    boxes of the one before that.

    Args:
        mail: open to every other rank, with processes that can be watched.
        group: says who is who, and when a rank is too late.
        aborted: set by another thread to release this rank, and here if a call fails.

    Every call raises GroupError if a rank is late, gone, or has closed its group, or if this rank is to be released.
    """

    def __init__(self, mail: Mailboxes, group: SplittableGroup, aborted: threading.Event):
        self._mail, self._group, self._aborted = mail, group, aborted
        self._rank, self._size = group.rank, group.size
        self._others = [r for r in range(group.size) if r != group.rank]
        self._calls, self._loans = 0, 0
        self._open: set[int] = set()  # loans that this rank has not ended
        self._lent: list[torch.Tensor] = []  # that readers may still read
        self._read: list[torch.Tensor] = []  # that they have read once they have begun this call

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        row = prod(input.shape[1:]) * input.element_size()
        send, receive = input.split_with_sizes(list(input_sizes)), output.split_with_sizes(list(output_sizes))
        box = self._next()
        for r in self._others:
            if n := input_sizes[r] * row:
                seen_as(send[r], self._mail.box(-1, r, box, n)).copy_(send[r])
        self._tell()
        receive[self._rank].copy_(send[self._rank])
        self._wait()
        for r in self._others:
            if n := output_sizes[r] * row:
                receive[r].copy_(seen_as(receive[r], self._mail.box(r, self._rank, box, n)))

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        """[...] of every rank -> [size, ...]."""
        output = input.new_empty(self._size, *input.shape)
        for r, part in enumerate(self._of_all(input, [input.numel()] * self._size)):
            output[r].view(-1).copy_(part)
        return output

    def all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        """In place, in the order of ranks: the same bits everywhere."""
        of_op: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum}
        reduce = of_op[op]
        flat = tensor.reshape(-1)
        for piece in flat.split(_PIECE):  # type: ignore[no-untyped-call]
            parts = self._of_all(piece, [len(piece)] * self._size)
            if len(piece) <= _SMALL:
                piece.copy_(_reduced(parts, reduce))
                continue
            ends = [len(piece) * r // self._size for r in range(self._size + 1)]
            mine = slice(ends[self._rank], ends[self._rank + 1])
            total = _reduced([part[mine] for part in parts], reduce)
            sizes = [b - a for a, b in pairwise(ends)]
            for to, part in zip(piece.split_with_sizes(sizes), self._of_all(total, sizes), strict=True):
                to.copy_(part)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view_as(tensor))

    def barrier(self) -> None:
        """Return once every rank has begun it."""
        self._next()
        self._tell()
        self._wait()

    def begin_loan(
        self, message: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        """As of a `Group`."""
        row = prod(message.shape[1:])
        blocks = as_bytes(message).split_with_sizes([n * row for n in input_sizes])
        places = [self._mail.place(block) if len(block) else 0 for block in blocks]
        number = self._loans + 1
        if min(self._open, default=number) <= number - PLACES:
            raise GroupError(f"begin_loan: of {PLACES} loans begun in turn the first must be ended before the next")
        self._wait_for(ENDED, number - PLACES)  # whose places are taken now
        self._loans = number
        self._open.add(number)
        for r, place in enumerate(places):
            self._mail.tell_place(r, number, place)
        read, self._lent = self._lent, []
        self._mail.counters(-1)[LOANS] = number

        def end() -> list[torch.Tensor]:
            self._wait_for(LOANS, number)
            read.clear()
            self._lent.append(message)
            owners = [-1 if r == self._rank else r for r in range(self._size)]
            found = [self._mail.read_place(owner, self._rank, number) for owner in owners]
            self._open.remove(number)
            self._mail.counters(-1)[ENDED] = min(self._open, default=self._loans + 1) - 1
            sizes = [n * row for n in output_sizes]
            parts = [self._mail.read(*where) for where in zip(owners, found, sizes, strict=True)]
            return [part.view(n, *message.shape[1:]) for part, n in zip(parts, output_sizes, strict=True)]

        return end

    def standing(self) -> str:
        """How many calls and loans each rank has begun: who is behind is waited for. Any thread may ask."""
        told = {r: self._mail.counters(-1 if r == self._rank else r) for r in range(self._size)}
        return "".join(f"rank {r}: {int(c[CALLS])} calls, {int(c[LOANS])} loans begun\n" for r, c in told.items())

    def close(self) -> None:
        """Others that wait for this rank are told that it will not come."""
        self._mail.counters(-1)[CLOSED] = 1
        self._lent = []

    def _of_all(self, input: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Every rank's input, [sizes[r]] elements, where it lies (a box for itself) until the call after."""
        flat, box, each = as_bytes(input.contiguous()), self._next(), input.element_size()
        self._mail.box(-1, self._rank, box, len(flat)).copy_(flat)
        self._tell()
        self._wait()
        owners = [-1 if r == self._rank else r for r in range(self._size)]
        boxes = [self._mail.box(owner, r, box, sizes[r] * each) for r, owner in enumerate(owners)]
        return [found.view(input.dtype) for found in boxes]

    def _next(self) -> int:
        """The number of the box for a new call."""
        self._calls += 1
        self._read, self._lent = self._lent, []
        return self._calls % 2

    def _tell(self) -> None:
        self._mail.counters(-1)[CALLS] = self._calls

    def _wait(self) -> None:
        self._wait_for(CALLS, self._calls)
        self._read.clear()

    def _wait_for(self, counter: int, number: int) -> None:
        limit = time.monotonic() + self._group.timeout_s
        for r in self._others:
            counters = self._mail.counters(r)
            for _ in range(_SPINS):
                if counters[counter] >= number:
                    break
            else:
                self._sleep_until(r, counter, number, limit)

    def _sleep_until(self, rank: int, counter: int, number: int, limit: float) -> None:
        counters, looks, look = self._mail.counters(rank), 0, 0.0
        while counters[counter] < number:
            time.sleep(_SLEEP_S if looks < _LONG else _LONG_S)
            looks += 1
            if (now := time.monotonic()) < look:
                continue
            look = now + _LOOK_S
            trouble = self._trouble(rank, now > limit)
            if trouble and counters[counter] < number:  # what it told before it went counts
                self._aborted.set()
                raise trouble

    def _trouble(self, rank: int, late: bool) -> GroupError | None:
        me, epoch = f"rank {self._rank}:", self._group.epoch
        if self._aborted.is_set():
            return GroupError(f"{me} the group of epoch {epoch} was aborted")
        if self._mail.counters(rank)[CLOSED]:
            return GroupError(f"{me} a peer of epoch {epoch} is gone: rank {rank} closed its group")
        if self._mail.gone(rank):
            return GroupError(f"{me} a peer of epoch {epoch} is gone: rank {rank} died")
        if late:
            limit_s = self._group.timeout_s
            return LateError(f"{me} no answer from the peers of epoch {epoch} in {limit_s:g} s, first rank {rank}")
        return None


def _reduced(parts: list[torch.Tensor], reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        reduce(total, part, out=total)
    return total


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] of a contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8)


def seen_as(tensor: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] as what a tensor, of any strides, is copied to or from."""
    return found.view(tensor.dtype).view(tensor.shape)
