"""A pass that leaves no trace: for measuring on a model that is about to be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ray_ep.moe import ExpertParallel


@contextmanager
def unseen(model: Any) -> Iterator[None]:
    """Inside: the model is in eval mode, and what its passes count, draw or leave behind is as before at the end.

    That is routing statistics and the reservoir, the meter, calls and loads of the layers, the routers' logits and
    torch's random state. Weights are the caller's to leave alone. Not collective.
    """
    ep: ExpertParallel = model.ray_ep
    meter, counters, routing = ep.meter, ep.counters, ep.routing
    training, enabled, spent, first = model.training, counters.enabled, counters.seconds, routing.first_token
    sent, pairs, seconds, logits = meter.sent.copy(), meter.pairs.copy(), dict(meter.seconds), list(routing.logits)
    layers = [(layer, layer.calls, layer.pass_load) for layer in ep.layers]
    done = replace(ep.balancer.done)
    device = next(model.parameters()).device
    counters.enabled = False  # then neither counts nor the reservoir change
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(training)
        counters.enabled, counters.seconds, routing.first_token = enabled, spent, first
        meter.sent[:], meter.pairs[:] = sent, pairs
        meter.seconds.update(seconds)
        ep.balancer.done = done
        routing.logits[:] = logits
        for layer, calls, load in layers:
            layer.calls, layer.pass_load = calls, load
