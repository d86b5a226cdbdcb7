"""A snapshot on disk, in the form of a checkpoint: written from the copies alone, while the model computes on.

Every rank writes its own files; rank 0 adds the dense part and, once all are written, the manifest: without that there
is nothing to be taken for a snapshot. Over the group of snapshots, in their thread. L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ray_ep.collective import Group
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.checkpoint import persistent_buffers
from ray_ep.rank.saved.directory import Directory
from ray_ep.rank.saved.disk import in_one_line
from ray_ep.rank.saved.writing import Tensors, write_rank
from ray_ep.rank.snapshot.copies import COUNTED, DenseCopy, OwnedCopy
from ray_ep.rank.step.optimizer import MasterOptimizer


class _Left(Exception):
    """Writing was broken off, since ranks have something else to do."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where the newest snapshot is kept on disk, and what no rank knows of its manifest.

    Args:
        url: a local directory that all nodes share, for snapshots alone.
        manifest: what the driver says in that of any checkpoint of the run.
        counted: routing statistics of before the run was begun or resumed; None: it began anew.
    """

    url: str
    manifest: dict[str, Any]
    counted: RoutingStatistics | None = None


class OnDisk:
    """Writes snapshots on one shelf and keeps the newest whole one there.

    Args:
        side: the group of snapshots. leave: set while writing is to end soon.
    """

    def __init__(self, shelf: Shelf, side: Group, leave: threading.Event):
        self.shelf, self.side, self.leave = shelf, side, leave
        self.directory = Directory(shelf.url)

    def write(self, own: OwnedCopy, dense: DenseCopy, model: torch.nn.Module, optimizer: MasterOptimizer) -> str:
        """Put one on the shelf (collective); why it is not there, if this rank should say so, else "".

        Args:
            model, optimizer: whose names the copies go by; their weights are not looked at.

        Raises:
            GroupError: a peer is gone.
        """
        step, rank = own.key.step, self.side.rank
        fault, left = self._cleared(step) if rank == 0 else "", False
        if not self._all_well(not fault):
            return fault
        tensors: dict[str, list[Any]] = {}
        try:
            names = [name for name, _ in persistent_buffers(model)]
            layers = [self._while_wanted(own.tensors(layer, optimizer)) for layer in range(len(own.layout.experts))]
            tensors = write_rank(self.directory, step, rank, self._while_wanted(dense.tensors(names)), layers)
        except _Left:
            left = True
        except Exception as e:  # each file system has errors of its own
            fault = in_one_line(e)
        statistics = self._counted(own)
        parts = self._at_rank_0(tensors)
        if self._all_well(not fault and not left):
            return self._committed(step, parts, statistics) if rank == 0 else ""
        if rank == 0:
            with suppress(Exception):  # the first error is the one that matters
                self.directory.tidy()
        return fault

    def _cleared(self, step: int) -> str:
        """What was never finished goes, and there is room for this one; else why not."""
        try:
            self.directory.tidy()
            self.directory.clear(step)
        except Exception as e:
            return in_one_line(e)
        return ""

    def _while_wanted(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in tensors:
            if self.leave.is_set():
                raise _Left
            yield key, tensor

    def _all_well(self, well: bool) -> bool:
        """Whether all ranks are (collective)."""
        faults = torch.tensor([int(not well)])
        self.side.all_reduce(faults)
        return not faults.item()

    def _at_rank_0(self, tensors: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """What all ranks have written, at rank 0; {} elsewhere (collective)."""
        mine = torch.frombuffer(bytearray(json.dumps(tensors).encode()), dtype=torch.uint8)
        sizes = self.side.all_gather(torch.tensor([len(mine)])).flatten().tolist()
        take = sizes if self.side.rank == 0 else [0] * self.side.size
        everything = torch.empty(sum(take), dtype=torch.uint8)
        self.side.all_to_all(everything, mine, take, [len(mine)] + [0] * (self.side.size - 1))
        parts = [json.loads(part.numpy().tobytes()) for part in torch.split(everything, take) if len(part)]
        return {key: where for part in parts for key, where in part.items()}

    def _counted(self, own: OwnedCopy) -> RoutingStatistics:
        """Routing statistics of all ranks as they were then, without a sample of tokens (collective)."""
        counted = dict(own.counted())
        sums = torch.cat([counted[name].flatten().double() for name in COUNTED])
        self.side.all_reduce(sums)
        experts = counted["total"].shape[1]
        parts = torch.split(sums.round().long(), [counted[name].numel() for name in COUNTED])
        load, *pairs = (part.numpy() for part in parts)
        return RoutingStatistics(load.reshape(-1, experts), *(p.reshape(-1, experts, experts) for p in pairs))

    def _committed(self, step: int, tensors: dict[str, list[Any]], statistics: RoutingStatistics) -> str:
        """Rank 0 makes it valid and removes the one before; else why not."""
        if (before := self.shelf.counted) is not None:
            sample = 0 if before.sample is None else before.sample.shape[1]
            statistics = RoutingStatistics.merge([before, statistics], sample)
        manifest = {**self.shelf.manifest, "step": step, "serial": self.directory.next_serial(), "tensors": tensors}
        try:
            self.directory.commit(step, manifest, statistics)
            self.directory.prune(1)
        except Exception as e:
            return in_one_line(e)
        return ""
