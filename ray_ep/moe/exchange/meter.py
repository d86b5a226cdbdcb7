"""What a rank's layers spend and send, and the one place where their exchanges are made, timed and counted.

No plans (dispatch.py, cpu/plan.py), no autograd. Imports the groups and laps.py. R ranks, L MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe.exchange.laps import Lap, Mark, count, mark

PHASES = ("route", "pack", "exchange", "experts", "combine")
"""Of a layer: agree who sends what; gather the rows; all-to-all, waiting included; experts; add up what came."""


@dataclass(slots=True)
class Meter:
    """What one rank's layers did since its making.

    On the CPU a phase takes what the host spends in it. On a CUDA device (not run on one yet) it takes what the stream
    does from the phase's first work to its last, waiting included: for peers, for an exchange on the side stream
    (`NcclGroup.seconds` counts from when that has its turn there), and for a host that is late with work. What has not
    ended yet counts later, never by a host sync. Parts of a layer's tokens that run on streams of their own, beside
    each other, count each for itself. While a graph is captured nothing is timed, and nothing of its replays.
    """

    sent: np.ndarray  # [R] bytes of hidden states and metadata
    _pairs: np.ndarray  # [L]
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _phase: str = ""
    _since: float = 0.0
    _there: torch.Tensor = field(init=False)  # [L] pairs that the device has counted since they were read last
    _on_device: bool = False
    _mark: Mark | None = None  # where the phase began
    _laps: list[Lap] = field(default_factory=list)  # that have not been counted

    def __post_init__(self) -> None:
        self._there = torch.zeros(len(self._pairs), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Go on counting on a device."""
        self._there = self._there.to(device)
        self._on_device = device.type == "cuda"

    def regroup(self, ranks: int) -> None:
        """Count what is sent anew, to other ranks [R]."""
        self.sent = np.zeros(ranks, np.int64)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, of all that has ended; always the same dict."""
        count(self._laps)
        return self._seconds

    @property
    def pairs(self) -> np.ndarray:
        """int64 [L] (token, expert) pairs computed here, forward passes only; to read them waits for the device."""
        self._pairs += self._there.cpu().numpy()
        self._there.zero_()
        return self._pairs

    def count(self, layer: int, pairs: int | torch.Tensor) -> None:
        """Count pairs computed in a layer; a number on the device (int64, no dimensions) stays there until it is read.

        So a captured graph counts whenever it is replayed.
        """
        if isinstance(pairs, int):
            self._pairs[layer] += pairs
        else:  # atomic on a GPU: parts of a layer's tokens run on streams of their own
            self._there[layer : layer + 1].scatter_add_(0, torch.zeros_like(pairs)[None], pairs[None])

    def enter(self, phase: str) -> str:
        """From now on time counts for `phase` ("": for none); returns the phase until now."""
        if self._on_device:
            return self._enter_on_device(phase)
        now, left = time.perf_counter(), self._phase
        if left:
            self._seconds[left] += now - self._since
        self._phase, self._since = phase, now
        return left

    def lap(self, began: Mark | None, add: Callable[[float], None]) -> Mark | None:
        """The present moment on the device's current stream, from which another lap may be taken.

        Args:
            began: what an earlier call on this stream gave.
            add: called once the device is there, after all that layers had done by then was counted, with the seconds
                since `began` (0 without one).

        Returns:
            None, and `add` is never called, while a graph is captured.
        """
        if torch.cuda.is_current_stream_capturing():
            return None
        now = mark()
        self._laps.append(Lap(began, now, add))
        count(self._laps)
        return now

    def _enter_on_device(self, phase: str) -> str:
        left, began, now = self._phase, self._mark, None
        if not torch.cuda.is_current_stream_capturing():
            if left and began is not None:  # it ends where it began, whatever stream is the current one
                ended = mark(began.stream)
                self._laps.append(Lap(began, ended, partial(self._add, left)))
                now = ended if began.stream == torch.cuda.current_stream() else None
            now = (now or mark()) if phase else None
            count(self._laps)
        self._phase, self._mark = phase, now
        return left

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    def add(self, sizes: list[int], row: torch.Tensor, rank: int) -> None:
        """Count `sizes` [R] rows like `row` [...]; what stays on the rank is not traffic."""
        per_row = row[:1].numel() * row.element_size() if len(row) else int(np.prod(row.shape[1:])) * row.element_size()
        for to, n in enumerate(sizes):
            if to != rank:
                self.sent[to] += n * per_row


class MeteredGroup:
    """A group as layers use it: the time of each exchange counts as `exchange`, what was timed before goes on.

    Calls are collective, in the same order on every rank, and raise what the group raises.

    Attributes:
        group: what it goes over.
        meter: of time and bytes.
    """

    def __init__(self, group: Group, meter: Meter):
        self.group, self.meter = group, meter

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.group.size

    def all_to_all(
        self, rows: torch.Tensor, give: list[int], take: list[int], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows [sum(give), ...] to the ranks in order -> [sum(take), ...], into `out` if given; bytes are counted."""
        out = rows.new_empty(sum(take), *rows.shape[1:]) if out is None else out
        phase = self.meter.enter("exchange")
        self.group.all_to_all(out, rows, take, give)
        self.meter.enter(phase)
        self.meter.add(give, rows, self.group.rank)
        return out

    def swap_sizes(self, sizes: torch.Tensor) -> torch.Tensor:
        """sizes int64 [R, ...], a row for each rank -> theirs for this one; the few bytes are not counted."""
        theirs, ones = torch.empty_like(sizes), [1] * self.group.size
        phase = self.meter.enter("exchange")
        self.group.all_to_all(theirs, sizes, ones, ones)
        self.meter.enter(phase)
        return theirs

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[...] of every rank, of one shape -> [R, ...]; bytes are counted."""
        phase = self.meter.enter("exchange")
        every = self.group.all_gather(x)
        self.meter.enter(phase)
        self.meter.add([1] * self.group.size, x[None], self.group.rank)
        return every

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank; the few bytes are not counted."""
        most = torch.tensor([number])
        phase = self.meter.enter("exchange")
        self.group.all_reduce(most, "max")
        self.meter.enter(phase)
        return int(most)

    def begin_loan(self, message: torch.Tensor, give: list[int], take: list[int]) -> Callable[[], list[torch.Tensor]]:
        """`Group.begin_loan` of message uint8 [sum(give), bytes]; what is returned ends it and is timed as well."""
        phase = self.meter.enter("exchange")
        end = self.group.begin_loan(message, take, give)
        self.meter.enter(phase)
        self.meter.add(give, message, self.group.rank)

        def ended() -> list[torch.Tensor]:
            phase = self.meter.enter("exchange")
            blocks = end()
            self.meter.enter(phase)
            return blocks

        return ended
