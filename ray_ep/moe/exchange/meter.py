"""What a rank's layers spend and send, and the one place where their exchanges are made, timed and counted.

No plans (dispatch.py, cpu/plan.py), no autograd. Imports the groups. R ranks, L MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ray_ep.collective import Group

PHASES = ("route", "pack", "exchange", "experts", "combine")
"""Of a layer: agree who sends what; gather the rows; all-to-all, waiting included; experts; add up what came."""


@dataclass(slots=True)
class Meter:
    """What one rank's layers did since its making."""

    sent: np.ndarray  # [R] bytes of hidden states and metadata
    _pairs: np.ndarray  # [L]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _phase: str = ""
    _since: float = 0.0
    _there: torch.Tensor = field(init=False)  # [L] pairs that the device has counted since they were read last

    def __post_init__(self) -> None:
        self._there = torch.zeros(len(self._pairs), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Go on counting on a device."""
        self._there = self._there.to(device)

    def regroup(self, ranks: int) -> None:
        """Count what is sent anew, to other ranks [R]."""
        self.sent = np.zeros(ranks, np.int64)

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
        now, left = time.perf_counter(), self._phase
        if left:
            self.seconds[left] += now - self._since
        self._phase, self._since = phase, now
        return left

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
