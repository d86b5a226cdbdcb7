"""One call to all rank actors at once: awaited, given up where ranks die, hang or fail, and the error that explains it.

Which calls there are is ranks.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from ray_ep.collective import Membership
from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.cause import Kind, kind_of, lost_ranks, root_cause, silent_cause
from ray_ep.driver.actors.cluster import SLICE_S
from ray_ep.driver.actors.gone import Gone
from ray_ep.driver.actors.heartbeat import Heartbeat
from ray_ep.driver.actors.placing import Place
from ray_ep.driver.actors.processes import explained, kill, locate
from ray_ep.driver.hang.keeping import Hangs
from ray_ep.errors import LateError, LostError, RankError

_RELEASED_S = 1.0
"""How long to wait for the other ranks once one is lost: aborted, they come back within 0.2 s, and may say why."""
_BACK = 2.0
"""After a loss, how many times cluster.silence_s ranks that answer may take to come back: at their next exchange."""
_TOGETHER_S = 0.3
"""Within so many seconds ranks that wait for the same peer say that it is late: they look every 0.01 or 0.2 s."""
_SAID_S = 2.0
"""How long to wait for all ranks to say what each finds by itself, before those that have not are aborted."""


class Calls:
    """Actors that are called together. A part of `Ranks`, which places and replaces them.

    Attributes:
        membership: who they are, under the epoch of their group.
        actors, where: [R] and where each is, as far as it is known.
        hangs: keeps what everybody was at when ranks hung; None: nobody wants to know, or the run is not there yet.
    """

    cfg: ClusterConfig
    membership: Membership
    actors: list[Any]
    where: list[dict[str, Any]]
    hangs: Hangs | None = None
    _interrupted: Callable[[], bool]
    _heartbeat: Heartbeat
    _gone: Gone
    _places: list[Place]

    def _call(
        self, method: str, *args: Any, each: Sequence[tuple[Any, ...]] | None = None, title: str = ""
    ) -> list[Any]:
        """Call a method on all ranks; results in rank order.

        Args:
            each: [R] arguments of each rank, behind the common ones.
            title: by which Ray's dashboard lists the calls; "": the method's name.

        Raises:
            LostError: ranks died or went silent; they are named. The others were aborted, which ends the life of their
                group, and have come back.
            RankError: a rank raised; it is named, with its own traceback. The others were aborted.
            BadInput, DivergedError: a rank found the user's input wrong, or values that are not finite.
            SaveError: a rank could not write; all have answered.
        """
        own = each or [()] * len(self.actors)
        methods = [getattr(actor, method) for actor in self.actors]
        methods = [m.options(name=title) for m in methods] if title else methods
        calls = {method.remote(*args, *own[r]): r for r, method in enumerate(methods)}
        results: list[Any] = [None] * len(self.actors)
        failed: dict[int, Exception] = {}  # in the order in which they failed
        silent: dict[int, str] = {}
        pending, limit, began, stacks = list(calls), float("inf"), 0.0, ""
        while pending and (left := limit - time.monotonic()) > 0:
            self._interrupted()
            done, pending = ray.wait(pending, num_returns=1, timeout=min(left, SLICE_S))
            for call in done:
                try:
                    results[calls[call]] = ray.get(call)
                except Exception as e:
                    failed[calls[call]] = e
            found, dead = self._heartbeat.look()
            found = {r: why for r, why in found.items() if r not in silent}
            late = not began and any(isinstance(e, LateError) for e in failed.values())
            if (found or late) and not stacks:
                stacks = self._stacks(found, failed, {c: calls[c] for c in pending})
            silent |= self._killed(found)
            failed = {r: e for r, e in (dead | failed).items() if r not in silent}
            pending = [c for c in pending if calls[c] not in silent]
            kinds = {kind_of(e) for e in failed.values()}
            if (silent or Kind.ALONE in kinds) and not began:
                began = time.monotonic()
                self._abort({*failed, *silent})
            if began:
                limit = began + (_RELEASED_S if lost_ranks(failed, ()) is None else _BACK * self.cfg.silence_s)
            elif Kind.BY_ALL in kinds:
                limit = min(limit, time.monotonic() + _SAID_S)
        if failed or silent:
            quiet = [calls[c] for c in pending if calls[c] not in failed]
            if quiet and not stacks and lost_ranks(failed, quiet) is not None:
                stacks = self._stacks({}, failed, {})
            if quiet and not began:
                self._abort(failed.keys())
            raise self._cause(failed, silent, quiet, stacks)
        return results

    def _stacks(self, silent: dict[int, str], failed: dict[int, Exception], pending: dict[Any, int]) -> str:
        """Where it is told what everybody is at, now that ranks are silent or late; "": nowhere.

        Args:
            pending: {call: rank} of the others: of ranks that are late for a peer one is the first to say so.
        """
        if self.hangs is None:
            return ""
        locate(self.where, self.actors)
        late = {r: "its actor does not answer" for r in self._heartbeat.late() if r not in failed}

        def raised() -> dict[int, Exception]:
            return failed if silent else {**failed, **_raised(pending)}

        return self.hangs.keep(self.membership, self.actors, self.where, late | silent, raised)

    def _cause(self, failed: dict[int, Exception], silent: dict[int, str], quiet: list[int], stacks: str) -> Exception:
        """The error of a call that failed, given those that did not come back, and where it is told what all did."""
        gone = lost_ranks(failed, [*silent, *quiet])
        if silent and gone is not None:
            self._gone.ask(self.where[rank] for rank in silent)
            cause: Exception = silent_cause(
                silent, [r for r in silent if self._places[r].node in self._gone.cut_off], self.where
            )
        else:
            cause = explained(root_cause(failed, quiet, self.where), self.where, self.actors, gone or ())
        if gone is None or not isinstance(cause, RankError):
            return cause
        words = f"{cause}\nstacks of {len(self.actors)} ranks: {stacks}" if stacks else str(cause)
        lost = LostError(cause.rank, words, gone, self._heartbeat.silent_s(gone), stacks)
        lost.__cause__ = cause.__cause__
        return lost

    def _killed(self, silent: dict[int, str]) -> dict[int, str]:
        """Kill ranks that are silent: should one wake up, it finds itself dead."""
        if silent:
            locate(self.where, self.actors)
            kill([self.actors[rank] for rank in silent])
        return silent

    def _abort(self, but: Collection[int]) -> None:
        """Release ranks from collectives, for whose end they would wait in vain."""
        for rank, actor in enumerate(self.actors):
            if rank not in but:
                actor.abort.remote(self.membership.epoch)


def _raised(calls: dict[Any, int]) -> dict[int, Exception]:
    """What ranks raise within _TOGETHER_S, of {call: rank}."""
    found: dict[int, Exception] = {}
    if calls:
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=_TOGETHER_S)[0]:
            try:
                ray.get(call)
            except Exception as e:
                found[calls[call]] = e
    return found
