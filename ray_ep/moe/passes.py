"""What differs between one pass over a model and the next: one context for all layers and routers of a rank.

No layer has a flag of its own for it. Imports what inference keeps (cpu/gemm.py, balance/guests.py). T tokens, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ray_ep.moe.balance.guests import ResidentGuests
from ray_ep.moe.cpu.gemm import Packed
from ray_ep.moe.recorder import Recorder


@dataclass(slots=True)
class Inference:
    """What stays between passes while weights do not change, by number of the layer.

    Attributes:
        packed: both weights of a layer, packed for the CPU; layers that cannot be are not in it.
        resident: guests of earlier passes.
    """

    packed: dict[int, tuple[Packed, Packed]] = field(default_factory=dict)
    resident: dict[int, ResidentGuests] = field(default_factory=dict)

    def forget(self, layer: int) -> None:
        """The layer's weights have changed."""
        self.packed.pop(layer, None)
        self.resident.pop(layer, None)


@dataclass(slots=True)
class Capture:
    """What one layer's next pass computes on: hidden [T, H], top_k_index and top_k_weights [T, K]; None: not yet."""

    layer: int
    work: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


Trace = list[list[tuple[torch.Tensor, torch.Tensor]]]
"""By layer, of each pass: experts and the ranks that answer, both [T, K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One kind of pass.

    Args:
        idle: this rank has no tokens: it takes part in every exchange with none.
        tokens: int64 [n] which of the pass's T tokens there are; the others are padding, which no expert computes and
            nothing counts. None: all.
        trace: who answers is noted there; tokens then travel flat, for only so a source knows.
        capture: a layer's work is kept there.
        recorder: who answers for chosen tokens is noted there; tokens travel as ever.
        inference: weights do not change: they are packed, and guests stay. Used where there are no gradients.
    """

    idle: bool = False
    tokens: torch.Tensor | None = None
    trace: Trace | None = None
    capture: Capture | None = None
    recorder: Recorder | None = None
    inference: Inference | None = None


class Passes:
    """Holds the pass that is being made, for all that must know.

    Attributes:
        now: the present pass.
    """

    def __init__(self) -> None:
        self.now = Pass()

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[Pass]:
        """Inside: passes with these fields of `Pass` changed."""
        outer = self.now
        self.now = replace(outer, **changes)
        try:
            yield self.now
        finally:
            self.now = outer


def recomputing() -> bool:
    """Whether we are inside a backward pass: then a forward is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)
