"""Groups over torch process groups: every failure of theirs becomes a GroupError, and waits can be aborted.

Imports group.py, device.py and torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ray_ep.collective.device import here, writable
from ray_ep.collective.group import SLICE, SplittableGroup, check_partner
from ray_ep.errors import GroupError, LateError


class TorchGroup(SplittableGroup):
    """A torch ProcessGroup behind the `Group` interface.

    Args:
        process_group: ProcessGroupGloo, or torch's default group.
        timeout_s: a collective that takes longer raises GroupError.
        on_close: called once by `close`.
        form: makes the new group of a split from this one and every rank's color; None: it cannot be split.
    """

    def __init__(
        self,
        process_group: Any,
        rank: int,
        size: int,
        epoch: int = 0,
        timeout_s: float = 300.0,
        on_close: Callable[[], None] = lambda: None,
        form: Callable[[TorchGroup, list[int]], TorchGroup] | None = None,
    ):
        super().__init__(rank, size, epoch, timeout_s)
        self._pg, self._make, self.on_close = process_group, form, on_close

    @property
    def timeout_s(self) -> float:
        """Limit of one collective, seconds; torch's own is the same once this was set again."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._timeout_s = value
        if (process_group := getattr(self, "_pg", None)) is not None:
            set_limit = getattr(process_group, "_set_default_timeout", None) or process_group.set_timeout
            set_limit(timedelta(seconds=value))

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> None:
        start = time.perf_counter()
        self._run(lambda: self._pg.alltoall_base(output, input, list(output_sizes), list(input_sizes)))
        self.seconds += time.perf_counter() - start

    def begin_loan(
        self, message: torch.Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        out = self.take(sum(output_sizes), *message.shape[1:], like=message)
        finish = self._start(out, message, list(output_sizes), list(input_sizes))

        def end() -> list[torch.Tensor]:
            start = time.perf_counter()
            finish()
            self.seconds += time.perf_counter() - start
            return list(out.split_with_sizes(list(output_sizes)))

        return end

    def all_gather(self, input: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        output = input.new_empty(self.size, *input.shape)
        self._run(lambda: self._pg.allgather([list(output.unbind())], [input.contiguous()]))
        self.seconds += time.perf_counter() - start
        return output

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp({"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        self._run(lambda: self._pg.allreduce([tensor], options))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._run(lambda: self._pg.broadcast([tensor], options))

    def barrier(self) -> None:
        self._run(lambda: self._pg.barrier(dist.BarrierOptions()))

    def _free(self) -> None:
        super()._free()
        self._pg = None

    def send(self, tensor: torch.Tensor, to: int, limit_s: float | None = None) -> None:
        """As of a `Group`.

        gloo closes the connection when a wait for a single message runs out, so this waits once, not in slices: an
        abort is seen only when the limit is over.
        """
        check_partner(to, self)
        limit, mine = self.timeout_s if limit_s is None else limit_s, here(tensor, tensor.device)
        self._run(lambda: self._pg.send([mine], to, 0), lambda work: _wait_once(work, limit), to)

    def receive(self, tensor: torch.Tensor, source: int, limit_s: float | None = None) -> None:
        check_partner(source, self)
        limit = self.timeout_s if limit_s is None else limit_s
        with writable(tensor, tensor.device, self.wait, fill=False) as buffer:
            self._run(lambda: self._pg.recv([buffer], source, 0), lambda work: _wait_once(work, limit), source)

    def _form(self, colors: list[int]) -> TorchGroup:
        if self._make is None:
            raise GroupError(f"rank {self.rank}: this group cannot be split: split the one that it came from")
        return self._make(self, colors)

    def _start(
        self, output: torch.Tensor, input: torch.Tensor, taken: list[int], given: list[int]
    ) -> Callable[[], None]:
        """all_to_all begun; what is returned ends it."""
        started: list[Any] = []
        self._run(lambda: self._pg.alltoall_base(output, input, taken, given), started.append)
        return lambda: self._run(started.pop)

    def _run(
        self, start: Callable[[], Any], finish: Callable[[Any], None] | None = None, partner: int | None = None
    ) -> None:
        """Start a call and finish it (None: as a collective); every failure becomes GroupError, at this one place.

        Args:
            partner: of a message.
        """
        self._check()
        try:
            (finish or self._finish)(start())
        except RuntimeError as e:
            self._aborted.set()
            who = "" if partner is None else f"rank {partner}, by a message: "
            late = partner is None and "imed out" in str(e)  # gloo's own clock was first
            gone = f"rank {self.rank}: a peer of epoch {self.epoch} is gone: {who}{str(e).splitlines()[0]}"
            raise (LateError if late else GroupError)(gone) from None

    def _finish(self, work: Any) -> None:
        """Wait for a started collective in slices."""
        limit = time.monotonic() + self.timeout_s
        while True:
            try:
                work.wait(SLICE)
                return
            except RuntimeError as e:
                if "imed out" not in str(e):
                    raise
                if work.is_completed():  # it ended between the slice's end and here: this wait says how
                    work.wait()
                    return
            if self._aborted.is_set():
                raise GroupError(f"rank {self.rank}: the group of epoch {self.epoch} was aborted")
            if time.monotonic() > limit:
                self._aborted.set()
                raise LateError(
                    f"rank {self.rank}: no answer from the peers of epoch {self.epoch} in {self.timeout_s:g} s"
                )


def _wait_once(work: Any, limit_s: float) -> None:
    """Wait for a started message."""
    work.wait(timedelta(seconds=limit_s))
