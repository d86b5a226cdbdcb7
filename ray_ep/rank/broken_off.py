"""Work of several passes that is left between two of them, as if it had not begun."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from ray_ep.moe import ExpertParallel


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
