"""Work of several passes that all ranks leave together, between two of them, as if it had not begun."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.config.schema import BatchConfig
from ray_ep.moe import ExpertParallel

PART = 64
"""Sequences of one pass of an evaluation, unless a pass of a step has more."""


def leaving(stop: threading.Event, group: Group, device: torch.device) -> bool:
    """Whether any rank was asked to leave: the same answer on every rank (collective; on a GPU a host sync)."""
    asked = torch.tensor([float(stop.is_set())], device=device)
    group.all_reduce(asked, "max")
    return bool(asked.item())


def evaluation_parts(mine: np.ndarray, rows: int, batch: BatchConfig) -> Iterator[tuple[int, np.ndarray]]:
    """This rank's rows of an evaluation over `rows` in passes, as many on every rank: (number of the first, rows).

    A rank may have none in a pass. What fits into one pass is one.
    """
    parts = max(1, -(-rows // max(PART, batch.sequences // batch.accumulation)))
    number = 0
    for part in np.array_split(mine, parts):
        yield number, part
        number += len(part)


class Before:
    """What passes of a step change, but for gradients, as it is now: counts, reservoir, meter, loads, random state.

    Copies the counters of pairs, 16 bytes for each pair of experts of each layer.
    """

    def __init__(self, model: Any):
        self.model = model
        ep: ExpertParallel = model.ray_ep
        self._device = next(model.parameters()).device
        self._random = torch.get_rng_state()
        self._random_there = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        self._counters = copy.deepcopy(vars(ep.counters))
        self._meter = (ep.meter.sent.copy(), ep.meter.pairs.copy(), dict(ep.meter.seconds))
        self._logits, self._first = list(ep.routing.logits), ep.routing.first_token
        self._layers = [(layer.calls, layer.pass_load) for layer in ep.layers]
        self._done = replace(ep.balancer.done)

    def restore(self) -> None:
        """Make it so again; once."""
        ep: ExpertParallel = self.model.ray_ep
        torch.set_rng_state(self._random)
        if self._random_there is not None:
            torch.cuda.set_rng_state(self._random_there, self._device)
        vars(ep.counters).update(self._counters)
        ep.meter.sent[:], ep.meter.pairs[:] = self._meter[:2]
        ep.meter.seconds.update(self._meter[2])
        ep.routing.logits[:], ep.routing.first_token = self._logits, self._first
        for layer, (calls, load) in zip(ep.layers, self._layers, strict=True):
            layer.calls, layer.pass_load = calls, load
        ep.balancer.done = self._done
