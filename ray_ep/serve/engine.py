"""The engine: ranks that answer requests, each request on one of them, all passes together.

It knows tokens, not text; what is served on top of it, or read from a file, is others'.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ray_ep.config.schema import Config
from ray_ep.driver.actors.placed import placed
from ray_ep.driver.ending import cause_of
from ray_ep.driver.forming import connect
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import BadInput, RayEPError, RequestError
from ray_ep.placement import Placement
from ray_ep.rank.generate.actor import News
from ray_ep.rank.generate.admission import refusal
from ray_ep.rank.generate.requests import ERROR, Delta, Limits, RankStatus, Request
from ray_ep.serve.checked import Checked
from ray_ep.serve.engine_ranks import GeneratingRanks

_WAIT_S = 0.2
"""Seconds of one wait for news, after which it is looked whether all ranks are there."""
_DEATH_S = 2.0
"""Seconds in which Ray says that a rank died, after its peers have noticed."""
_LAST_S = 10.0
"""Seconds in which ranks that were closed tell the ends of their requests."""

OnDeltas = Callable[[list[Delta]], None]
"""Is given what is new of requests; called from the engine's thread, must not block."""


@contextmanager
def formed(
    cfg: Config, checked: Checked, interrupt: Interrupt, phase: Callable[[str], None] = lambda name: None
) -> Iterator[GeneratingRanks]:
    """Inside: ranks that hold the model and can compute together; at the end all that was started is gone.

    Raises:
        ClusterError: the cluster has no room, or its nodes cannot reach the checkpoint.
        RankError: a rank was lost while it started.
    """
    with placed(cfg.cluster, "generate", interrupt, phase, kind=GeneratingRanks) as (ranks, _):
        topology = connect(cfg, ranks, phase)
        phase("loading the model")
        ranks.load_model(cfg, checked.config, checked.placement, topology)
        phase("choosing the exchange")
        ranks.choose_exchange(0)
        yield ranks


@contextmanager
def engine(
    cfg: Config, checked: Checked, on_deltas: OnDeltas, interrupt: Interrupt,
    phase: Callable[[str], None] = lambda name: None,
) -> Iterator[Engine]:  # fmt: skip
    """Inside: an engine that takes requests. At the end what is open is failed, and all that was started is gone.

    Args:
        checked: the checkpoint, from `check_checkpoint`.
        interrupt: looked at in every wait until requests are taken; afterwards by the caller.
        phase: told what a start is at; "": it has ended.
    """
    with formed(cfg, checked, interrupt, phase) as ranks:
        phase("trying the model's cache")
        with engine_on(cfg, ranks, on_deltas) as it:
            phase("")
            yield it


@contextmanager
def engine_on(cfg: Config, ranks: GeneratingRanks, on_deltas: OnDeltas) -> Iterator[Engine]:
    """Inside: an engine on ranks that have formed and take no requests yet; at the end they are as before."""
    limits, note = ranks.open()
    with ranks.in_background():
        it = Engine(cfg, ranks, limits, on_deltas, note)
        try:
            yield it
        finally:
            it.stop()


@dataclass(slots=True)
class _Open:
    """A request on its rank, and the tokens that are still to be computed for it, at most."""

    rank: int
    left: int


class Engine:
    """Takes requests and tells what comes back: see `ray_ep.serve.answering.Answering`.

    Attributes:
        limits: what a request may have. note: why batches are static; "": they are not.
        failed: why nothing is answered any more; "": requests are taken.
    """

    def __init__(self, cfg: Config, ranks: GeneratingRanks, limits: Limits, on_deltas: OnDeltas, note: str):
        self.cfg, self.limits, self.note, self.failed = cfg, limits, note, ""
        self._ranks, self._on_deltas = ranks, on_deltas
        self._lock = threading.Lock()  # of what follows
        self._open: dict[str, _Open] = {}
        self._status = [RankStatus(rank=rank) for rank in range(len(ranks.actors))]
        self._calling = threading.Lock()  # of calls to all ranks, and looks at who is there
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request in; it goes to the rank with the fewest outstanding tokens.

        Raises:
            RequestError: it cannot be computed, its id is open, or the engine has failed.
        """
        if why := refusal(request, self.limits):
            raise RequestError(why)
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        with self._lock:
            if self.failed:
                raise RequestError(self.failed)
            if request.id in self._open:
                raise RequestError(f"a request with id {request.id!r} is open")
            left = self._outstanding()
            rank = min(range(len(left)), key=lambda r: (left[r], r))
            self._open[request.id] = _Open(rank, len(request.prompt) + request.max_new_tokens)
            self._ranks.submit(rank, [request])  # does not wait; in the lock, so that no `cancel` is sent before it
            for other, tokens in enumerate(left):
                if other != rank and not tokens:
                    self._ranks.submit(other, [])  # it sleeps, and every pass is one of all ranks

    def cancel(self, id: str) -> None:
        """Have a request end early; one that is over, or unknown, is passed over."""
        with self._lock:
            it = self._open.get(id)
            if it is not None:
                self._ranks.submit(it.rank, [], [id])

    def status(self) -> list[RankStatus]:
        """Each rank as it told last, within a second or so."""
        with self._lock:
            left = self._outstanding()
            mine = [it.rank for it in self._open.values()]
            return [replace(s, outstanding_tokens=left[r], requests=mine.count(r)) for r, s in enumerate(self._status)]

    def move(self, placement: Placement) -> int:
        """Move experts between two passes; open requests go on. Blocks until done; returns how many experts moved.

        Raises:
            PlacementError: it does not fit; nothing has changed.
            RankError: a rank was lost: the engine has failed.
        """
        with self._calling:
            try:
                return self._ranks.move(placement, self.cfg.placement.migration_buffer_mb)[0].moves
            except BadInput:
                raise
            except RayEPError as e:
                self._fail(cause_of(e))
                raise

    def stop(self, hard: bool = True) -> None:
        """Take no more requests; those that are open are failed, or (not hard) answered first. Safe to call again."""
        if not self.failed and not self._ending.is_set():
            with self._calling:
                try:
                    self._ranks.close(hard)
                except RayEPError as e:
                    self._fail(cause_of(e))
        self._ending.set()
        self._thread.join(_LAST_S)
        self._fail("the engine was stopped")

    def _outstanding(self) -> list[int]:
        tokens = [0] * len(self._status)
        for it in self._open.values():
            tokens[it.rank] += it.left
        return tokens

    def _listen(self) -> None:
        while not self.failed and not (self._ending.is_set() and not self._open):
            told = self._ranks.news(_WAIT_S)
            for rank, news in told:
                self._take(rank, news)
            fault = next((news.failed for _, news in told if news.failed), "")
            if self._calling.acquire(blocking=False):
                try:
                    if fault or not self._ranks.alive():
                        self._fail(self._why(fault))
                finally:
                    self._calling.release()

    def _why(self, fault: str) -> str:
        """What explains a failure: a rank that is gone rather than what others say of it."""
        limit = time.monotonic() + _DEATH_S
        while True:
            try:
                self._ranks.beat()
            except RayEPError as e:
                return cause_of(e)
            if time.monotonic() > limit:
                return fault or "a rank did not answer"
            time.sleep(0.1)

    def _take(self, rank: int, news: News) -> None:
        with self._lock:
            self._status[rank] = news.status
            deltas = [d for d in news.deltas if d.id in self._open]
            if news.failed:  # what a rank says of its own is not why: `_fail` tells that
                deltas = [d for d in deltas if d.done != ERROR]
            for delta in deltas:
                self._open[delta.id].left -= len(delta.tokens)
                if delta.done:
                    del self._open[delta.id]
        if deltas:
            self._on_deltas(deltas)

    def _fail(self, why: str) -> None:
        with self._lock:
            self.failed = self.failed or why
            ids = list(self._open)
            self._open.clear()
        if ids:
            self._on_deltas([Delta(id=id, done=ERROR, error=why) for id in ids])
