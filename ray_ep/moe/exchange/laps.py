"""Time on a CUDA device: events that are recorded where the work is, and read once it is done, without a host sync.

What is timed is meter.py's. Imports torch. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment on a stream: all that it held by then is done."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event


@dataclass(frozen=True, slots=True)
class Lap:
    """The time between two moments on one stream, until it is counted.

    Args:
        began: None: nothing is timed, `add` is only to be called in its turn.
        add: takes the seconds.
    """

    began: Mark | None
    ended: Mark
    add: Callable[[float], None]


def mark(stream: torch.cuda.Stream | None = None) -> Mark:
    """Now, on a stream; None: the current one."""
    stream = stream or torch.cuda.current_stream()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return Mark(stream, event)


def count(laps: list[Lap]) -> None:
    """Take the laps off that have ended, in order; what is behind one that has not waits for another time."""
    over = 0
    for lap in laps:
        if not lap.ended.event.query():  # type: ignore[no-untyped-call]
            break
        began = lap.began
        lap.add(0.0 if began is None else began.event.elapsed_time(lap.ended.event) / 1e3)
        over += 1
    del laps[:over]
