"""What every rank has goes to ranks that come: dense masters and moments, frozen dense weights, buffers, settings.

Each of the others sends an equal part of every message, so that no one's link carries all of it. Experts move later.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch

from ray_ep.collective import Group
from ray_ep.rank.trainer import Trainer

PIECE = 16 << 20
"""Bytes that a rank that comes receives in one message."""


@torch.no_grad()
def hand_over(trainer: Trainer, fresh: Collection[int]) -> None:
    """Give ranks `fresh` of the group all that every rank has (collective, between steps, before `regroup`).

    What those had before is overwritten; they own no experts then.

    Raises:
        GroupError: a peer is gone.
    """
    group, optimizer = trainer.group, trainer.optimizer
    given = [rank for rank in range(group.size) if rank not in fresh]
    comes = group.rank in fresh
    told = _told(trainer, given[0])
    if comes:
        optimizer.begin_after(told["updates"], {})
        trainer.ep.exchange_by(**told["exchange"])
        trainer.ep.gemm.library = {getattr(torch, name): library for name, library in told["libraries"].items()}
    held = Bytes(_everywhere(trainer))
    for start in range(0, held.size, PIECE):
        _piece(group, held, given, sorted(fresh), start, min(start + PIECE, held.size))
    group.wait()
    if comes:
        held.put_back()
        optimizer.round()


def _told(trainer: Trainer, source: int) -> dict[str, Any]:
    """What has no tensor, as `source` has it: updates, how to exchange, libraries that multiply (collective)."""
    libraries = {str(dtype).removeprefix("torch."): name for dtype, name in trainer.ep.gemm.library.items()}
    said = {"updates": trainer.optimizer.updates, "exchange": asdict(trainer.ep.exchange), "libraries": libraries}
    mine = json.dumps(said).encode().ljust(1024, b"\0")
    words = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(trainer.device)
    trainer.group.broadcast(words, source)
    trainer.group.wait()
    found: dict[str, Any] = json.loads(bytes(words.cpu().numpy()).rstrip(b"\0"))
    return found


def _everywhere(trainer: Trainer) -> list[torch.Tensor]:
    """What every rank has the same of, in one order: dense weights, trained or not, their moments, buffers."""
    weights = [w for w in trainer.optimizer.weights if w.layer is None]
    frozen = [w.param.data for w in trainer.optimizer.frozen if w.layer is None]
    kept = [t for w in weights for t in (w.master.data, *(w.moments[k] for k in sorted(w.moments)))]
    return [*kept, *frozen, *trainer.model.buffers()]


def _piece(group: Group, held: Bytes, given: list[int], fresh: list[int], start: int, end: int) -> None:
    """Bytes [start, end), a part from each of `given` to each of `fresh` (collective)."""
    edges = [start + (end - start) * i // len(given) for i in range(len(given) + 1)]
    give, take = [0] * group.size, [0] * group.size
    if group.rank in fresh:
        for i, rank in enumerate(given):
            take[rank] = edges[i + 1] - edges[i]
        into = torch.empty(end - start, dtype=torch.uint8, device=held.device)
        group.all_to_all(into, into.new_empty(0), take, give)
        group.wait()
        held.write(start, into)
        return
    place = given.index(group.rank)
    mine = held.read(edges[place], edges[place + 1])
    for rank in fresh:
        give[rank] = len(mine)
    group.all_to_all(mine.new_empty(0), mine.repeat(len(fresh)), take, give)


class Bytes:
    """Tensors as one run of bytes, uint8 [size]; those that are not contiguous are written to by `put_back`."""

    def __init__(self, tensors: list[torch.Tensor]):
        self._whole = [(t, t.detach().contiguous()) for t in tensors if t.numel()]
        self._flat = [c.reshape(-1).view(torch.uint8) for _, c in self._whole]
        self._ends = list(accumulate(len(f) for f in self._flat))
        self.size = self._ends[-1] if self._ends else 0
        self.device = self._flat[0].device if self._flat else torch.device("cpu")

    def read(self, start: int, end: int) -> torch.Tensor:
        """Bytes [start, end), copied."""
        parts = list(self._parts(start, end))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=self.device)

    def write(self, start: int, data: torch.Tensor) -> None:
        """Bytes from `start` on are `data` now."""
        at = 0
        for part in self._parts(start, start + len(data)):
            part.copy_(data[at : at + len(part)])
            at += len(part)

    def put_back(self) -> None:
        """Tensors whose bytes were written elsewhere have them."""
        for tensor, contiguous in self._whole:
            if tensor.data_ptr() != contiguous.data_ptr():
                tensor.copy_(contiguous)

    def _parts(self, start: int, end: int) -> Iterator[torch.Tensor]:
        """Views that make up bytes [start, end)."""
        index = bisect_right(self._ends, start)
        while start < end:
            flat, begin = self._flat[index], self._ends[index] - len(self._flat[index])
            stop = min(end, self._ends[index])
            yield flat[start - begin : stop - begin]
            start, index = stop, index + 1
