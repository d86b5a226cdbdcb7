"""After each step: should the run have more ranks, or fewer, or other ones; if so they are asked for, taken in, let go.

How many is decided in policy.py, who leaves in leavers.py; newcomers and the switch are resize.py's. One change at a
time. Every call is made between two steps and returns at once, but for a switch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ray_ep.config.schema import Config
from ray_ep.driver.elastic.around import Counts, PlacedRanks, Resizing, Signs
from ray_ep.driver.elastic.forecast import Forecast, Outlook, fixed_seconds, next_node
from ray_ep.driver.elastic.leavers import can_go, ranks_on, surplus
from ray_ep.driver.elastic.limits import fewest_ranks, most_ranks
from ray_ep.driver.elastic.orders import Orders, numbers
from ray_ep.driver.elastic.policy import Standing, Wish, wish
from ray_ep.driver.forming import Formed
from ray_ep.driver.records import Event
from ray_ep.errors import LostError, PlacementError
from ray_ep.rank.results import StepResult

log = logging.getLogger("ray_ep.driver")

UNSERVED_S = 10.0
"""Seconds after which a change that has found no room yet makes way for the next request."""
REFUSED_S = 30.0
"""Seconds without another switch after one that the ranks have no room for."""

_ADVISED = "advised, and not carried out (elastic.mode=advise)"


class Elastic:
    """Who should be a member of one run.

    Args:
        experts: of a layer.
        counts: planned leaves are added there.
        publish: tells an operator. clock: seconds.

    Attributes:
        orders: what somebody asked for; requests are put there.
    """

    def __init__(
        self,
        cfg: Config,
        experts: int,
        ranks: PlacedRanks,
        resizer: Resizing,
        signs: Signs,
        counts: Counts,
        publish: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.ranks, self.resizer = cfg, ranks, resizer
        self.signs, self.counts, self.publish, self.clock = signs, counts, publish, clock
        self.orders, self.forecast = Orders(cfg, experts, self._say, self._say_once), Forecast()
        self._least, self._most = fewest_ranks(cfg, experts)[0], most_ranks(cfg)[0]
        self._kept: set[str] = set()  # slow members that nobody came for
        self._members = ranks.membership.members
        self._missing_since: float | None = None
        self._change_since: float | None = None
        self._no_switch_before = float("-inf")
        self._wanted = Wish(ranks.membership.size, "")
        self._told: dict[str, object] = {}

    def after_step(self, now: Formed, load: np.ndarray, results: Sequence[StepResult], seconds: float) -> Formed | None:
        """What is due after a step; what the run goes on with if its ranks are others from here on, else None.

        Args:
            now: what it goes on with so far. load: [L, E] of recent steps, to plan by.
            results: what the ranks say of the step, which took `seconds`; none: the run is paused after it.

        Raises:
            LostError: a rank was lost meanwhile.
        """
        self._notice()
        self.resizer.poll()
        self._serve(now.placement.version)
        drained, slow = self._leaving()
        leaving = sum(map(len, drained.values())) + len(slow)
        self._predict(results, seconds)
        self._wanted = self._wished(leaving)
        if not self._acts:
            self._wanted = self._advised(self._wanted, leaving)
        self._adjust(leaving)
        leave = self._leave_now(drained, slow)
        ready = self.resizer.ready and not self.resizer.joining
        return self._switched(now, leave, load) if leave or ready else None

    @property
    def _acts(self) -> bool:
        """Whether what is decided here is carried out: what somebody asked for always is."""
        return self.cfg.elastic.mode == "act" or bool(self.orders.ranks)

    @property
    def _coming(self) -> int:
        return self.resizer.waiting + self.resizer.joining + self.resizer.ready

    def _notice(self) -> None:
        """If ranks are others than after the step before, what was known of those does not hold."""
        if self.ranks.membership.members != self._members:
            self._members, self._missing_since = self.ranks.membership.members, None
            self.forecast.forget()
            self.signs.forget()

    def _serve(self, version: int) -> None:
        """Have the oldest request stand, unless a change is under way; one that found no room yet makes way for it."""
        resizer = self.resizer
        if not self._coming:
            self._change_since = None
        elif self._change_since is None:
            self._change_since = self.clock()
        unserved = self._change_since is not None and self.clock() - self._change_since >= UNSERVED_S
        under_way = bool(resizer.joining or resizer.ready or (resizer.waiting and not unserved))
        if self.orders.serve(under_way, self.ranks, version):
            self._missing_since = None
            resizer.avoid(self.orders.drained)
            self.signs.forget()

    def _leaving(self) -> tuple[dict[str, list[int]], list[int]]:
        """Ranks that are to leave: those on each node that is drained, the first deadline first; and a slow one."""
        if self.cfg.exchange.transport == "deepep":  # a lost rank ends such a run, and so would one that goes
            return {}, []
        deadlines = self.signs.draining()
        nodes = sorted(deadlines, key=lambda node: deadlines[node] or float("inf"))
        drained = ranks_on(dict.fromkeys([*nodes, *self.orders.drained]), self.ranks.where)
        return drained, self._slow({rank for group in drained.values() for rank in group})

    def _slow(self, gone: Collection[int]) -> list[int]:
        """The slow rank that is to be replaced, on another node; []: none. `gone` leave in any case."""
        if not self.cfg.elastic.evict_stragglers:
            return []
        too_slow = set(self.signs.slow()) - self._kept
        slow = [r for r, m in enumerate(self._members) if m in too_slow and r not in gone][:1]
        if slow and not self._acts:
            words = f"rank {slow[0]} is slow: another in its place (elastic.evict_stragglers)"
            self._say_once("slow", self._members[slow[0]], f"{_ADVISED}: {words}")
            return []
        self.resizer.avoid([*self.orders.drained, *(self.ranks.where[r]["node"] for r in slow)])
        return slow

    def _predict(self, results: Sequence[StepResult], seconds: float) -> None:
        """Have steps with one rank more and one fewer predicted, where that decides."""
        if not results or self.cfg.elastic.policy != "throughput" or self.orders.ranks or self._coming:
            return
        if not self.forecast.stepped():
            return
        members, where = self.ranks.membership, [w["node"] for w in self.ranks.where]
        node = next_node(self.signs.free(self.orders.drained) or {}, where, members.node_of)
        try:
            outlook = Outlook(self.signs.question(), fixed_seconds(results, seconds), node)
        except PlacementError as e:
            log.warning("forecast why=%r", str(e))
            return
        self.forecast.ask(outlook, [members.size - 1, members.size + 1])

    def _wished(self, leaving: int) -> Wish:
        """How many ranks there should be."""
        staying, target = self.ranks.membership.size - leaving, self.orders.ranks or self.cfg.cluster.ranks
        waiting, joining, ready = self.resizer.waiting, self.resizer.joining, self.resizer.ready
        if staying + joining + ready >= target:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = self.clock()
        free = self.signs.free(self.orders.drained) if self.cfg.elastic.policy == "available" else None
        standing = Standing(
            staying, target, waiting, joining, ready, bool(self.orders.ranks), self._waited_s(),
            None if free is None else sum(free.values()), self.forecast.step_seconds,
        )  # fmt: skip
        return wish(self.cfg.elastic, self._least, self._most, standing)

    def _advised(self, found: Wish, leaving: int) -> Wish:
        """Tell a wish that is not carried out, once; what is carried out: no change, but for what must be there."""
        there = self.ranks.membership.size - leaving + self._coming
        if found.ranks != there:
            words = f"{_ADVISED}: {there} -> {found.ranks} ranks: {found.words}"
            self._say_once("advice", found.ranks, words, desired=found.ranks)
        else:
            self._told.pop("advice", None)
        return Wish(max(there, self.cfg.elastic.min_ranks), found.words)

    def _adjust(self, leaving: int) -> None:
        """Ask for as many as are wanted, or give up some that are on their way."""
        before = self._coming
        short = self._wanted.ranks - (self.ranks.membership.size - leaving) - before
        if short > 0:
            self.resizer.ask(short)
        elif short < 0 < before:
            self.resizer.withdraw(min(-short, before))
        change = self._coming - before  # 0: shortly after a failure nobody is asked for
        if change:
            self.signs.forget()
            what = f"asks for {change} more" if change > 0 else f"gives up {-change} that were to come"
            self._say(f"{what}: {self._wanted.words}")

    def _leave_now(self, drained: dict[str, list[int]], slow: list[int]) -> dict[int, str]:
        """Ranks that go now, and why: of drained nodes as many as can, a slow one if it is replaced, those too many."""
        active, ready, least = self.ranks.membership.size, self.resizer.ready, self.cfg.elastic.min_ranks
        can = can_go(list(drained.values()), active, ready, least)
        leave = {r: f"node {node} is drained" for node, ranks in drained.items() for r in ranks if r in can}
        stay = [rank for ranks in drained.values() for rank in ranks if rank not in leave]
        if stay:
            left = active - len(leave) - len(stay)
            why = f"{left} would be left, elastic.min_ranks={least}" if left else "none would be left"
            self._say_once("stay", tuple(stay), f"ranks {numbers(stay)} stay until others come: {why}")
        if slow and ready and active + ready - len(leave) - 1 >= self._wanted.ranks:
            leave[slow[0]] = f"rank {slow[0]} is slow"
        elif slow and not self._coming and self._waited_s() >= self.cfg.elastic.wait_s:
            self._kept.add(self._members[slow[0]])
            self._say(f"rank {slow[0]} is slow and stays: nobody came in its place ({self._wanted.words})")
        going = {*leave, *stay, *slow}
        if (many := active - len(going) - self._wanted.ranks) > 0:
            leave |= dict.fromkeys(surplus(many, self.ranks.where, going), self._wanted.words)
        return leave

    def _waited_s(self) -> float:
        return 0.0 if self._missing_since is None else self.clock() - self._missing_since

    def _switched(self, now: Formed, leave: dict[int, str], load: np.ndarray) -> Formed | None:
        """Have ranks leave, each for its reason, and come in; None: they could not."""
        if self.clock() < self._no_switch_before:
            return None
        before = self.ranks.membership
        gone = [before.members[rank] for rank in leave]
        why = [*leave.values(), *([self._wanted.words] if self.resizer.ready else [])]
        try:
            formed = self.resizer.switch(now, sorted(leave), load)
        except PlacementError as e:
            self._no_switch_before = self.clock() + REFUSED_S
            self._say(f"nobody comes or goes within {REFUSED_S:g} s: {e}")
            return None
        except LostError as e:
            self._say(f"a change from {before.size} ranks was cut short: {str(e).splitlines()[0]}", left=gone)
            raise
        finally:
            self.counts.planned_leaves += sum(m not in self.ranks.membership.members for m in gone)
        after = self.ranks.membership
        self._say(
            f"{before.size} -> {after.size} ranks in epoch {after.epoch}, switched in "
            f"{sum(self.resizer.took.values()):.2f} s: {'; '.join(dict.fromkeys(why))}",
            come=[m for m in after.members if m not in before.members],
            left=gone,
            seconds=dict(self.resizer.took),
        )
        return formed

    def _say_once(self, subject: str, key: object, words: str, **fields: Any) -> None:
        """Say it unless it was the last that was said of this subject."""
        if self._told.get(subject) != key:
            self._told[subject] = key
            self._say(words, **fields)

    def _say(self, words: str, **fields: Any) -> None:
        active, resizer = self.ranks.membership.size, self.resizer
        figures = {
            "desired": self._wanted.ranks, "active": active, "allocated": active + resizer.joining + resizer.ready,
            "waiting": resizer.waiting, "joining": resizer.joining, "ready": resizer.ready,
            "reason": self._wanted.words, "planned_leaves": self.counts.planned_leaves,
            "failures": self.counts.failures, "predicted": {str(n): s for n, s in self.forecast.step_seconds.items()},
        }  # fmt: skip
        self.publish(Event("elastic", words, {**figures, **fields}))
