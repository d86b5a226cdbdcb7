"""What passes of a model change beside gradients, as it was before them: to be put back when they shall not count.

A half step is undone by it, and a trial. Knows the layers' holders of state; weights and gradients are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from ray_ep.moe import ExpertParallel

OF_LAYER = ("calls", "pass_load")
"""Attributes of a layer that a pass changes; they are put back when a step is undone. All else is its placement."""


class Before:
    """State of now. Routing counts are kept apart from now on, so that nothing large is copied.

    Args:
        more: objects that the passes change too, beside what all layers count and leave behind.
    """

    def __init__(self, model: Any, *more: object):
        ep: ExpertParallel = model.ray_ep
        self._model, self._training, self._ep = model, model.training, ep
        self._device = next(model.parameters()).device
        self._random = torch.get_rng_state()
        self._random_there = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        ep.counters.begin_step()
        _ = ep.meter.pairs  # fetches what a device has counted
        self._back = [_contents(thing) for thing in (ep.meter, ep.routing, ep.passes, ep.balancer.done, *more)]
        self._layers = [[(name, getattr(layer, name)) for name in OF_LAYER] for layer in ep.layers]

    def restore(self) -> None:
        """Put it back. Not collective; it may follow passes that were broken off anywhere."""
        self._model.train(self._training)
        torch.set_rng_state(self._random)
        if self._random_there is not None:
            torch.cuda.set_rng_state(self._random_there, self._device)
        self._ep.counters.drop_step()
        _ = self._ep.meter.pairs
        for back in self._back:
            back()
        for layer, values in zip(self._ep.layers, self._layers, strict=True):
            for name, value in values:
                setattr(layer, name, value)


@contextmanager
def unseen(model: Any) -> Iterator[None]:
    """Inside: the model is in eval mode, and what its passes count, draw or leave behind is as before at the end.

    That is routing statistics and the reservoir, the meter, calls and loads of the layers, the routers' logits and
    torch's random state; after an error also what the balance has learnt, for others may have learnt it or not.
    Weights are the caller's to leave alone. Not collective.
    """
    before, learnt = Before(model), _contents(model.ray_ep.balancer)
    model.eval()
    try:
        with model.ray_ep.counters.off():
            yield
    except BaseException:
        learnt()
        raise
    finally:
        before.restore()


def _contents(thing: Any) -> Callable[[], None]:
    """Attributes of an object as they are, and what its lists, dicts and arrays hold: calling puts them back.

    In place, since others may refer to a container. What is inside of a container, and a tensor, is kept as it is: a
    step makes new ones.
    """
    names = [f.name for f in fields(thing)] if is_dataclass(thing) else list(vars(thing))
    kept = {name: getattr(thing, name) for name in names}
    inside = {name: value.copy() for name, value in kept.items() if isinstance(value, (list, dict, np.ndarray))}

    def back() -> None:
        for name, value in kept.items():
            setattr(thing, name, value)
            if isinstance(value, dict):
                value.clear()
                value.update(inside[name])
            elif name in inside:
                value[:] = inside[name]

    return back
