"""The links of a run, kept as they are: one that slows or recovers while the job steps is noticed, measured and named.

What is made of it is decided elsewhere (rebalancer.py). Every call here is made between two steps of the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ray_ep.driver.actors import probe
from ray_ep.driver.rebalance.recent import MeasuredStep
from ray_ep.driver.records import Event
from ray_ep.errors import PlacementError
from ray_ep.placement import Topology
from ray_ep.placement.links.groups import in_words
from ray_ep.placement.links.probe import Pair
from ray_ep.placement.links.watch import LinkWatch

QUIET = 10
"""Steps after a measurement in vain before exchanges may ask for another; twice as many after the next in vain."""
MOST = 32
"""At most so many times as long are the waits after measurements in vain."""
CHANGED_BETWEEN = 1.5
"""A link that is slower or faster by this factor when it is measured again has changed."""
CHANGED_INSIDE = 4.0
"""The same inside a node, where messages go through the host's memory and take as long as its processors let them: on a
busy host twice as long in one measurement as in the next. Not so where the GPUs' driver names a link of their own."""
GLANCE = 0.1
"""Share of the budget of a whole measurement that a look at slowed links may take."""
LOOKED_AT = 8
"""Slowed links that are looked at again at most, the most slowed: one that recovers has all links measured."""


class LinkedRanks(probe.ProbingRanks, Protocol):
    """Of the driver's ranks what is used here."""

    def probe_links(self, known: Topology, pairs: list[Pair], budget_s: float) -> Topology:
        """`known` with the links between `pairs` of ranks measured again."""


class Links:
    """Watches the exchanges of a run for links that slow, and looks again at those that did.

    A link that recovers may not show in the exchanges, for experts have moved so that little crosses it. So the slowed
    links alone are measured again, shortly, every so many steps; after a look in vain the next one is twice as far.

    Args:
        every: steps between two looks at slowed links; 0: nothing is watched.
        keep: is given each new topology. publish: tells an operator.

    Attributes:
        topology: as it was measured last.
        slowed: (source, destination) of links that were faster once -> bytes/s that they had.
    """

    def __init__(
        self,
        ranks: LinkedRanks,
        topology: Topology,
        budget_s: float,
        every: int,
        keep: Callable[[Topology], None],
        publish: Callable[[Event], None],
    ):
        self.ranks, self.topology, self.budget_s, self.every = ranks, topology, budget_s, every
        self.keep, self.publish = keep, publish
        self.slowed: dict[Pair, float] = {}
        self._watch = LinkWatch(topology)
        self._suspected = ""  # what the next measurement is for
        self._vain = self._vain_looks = 0  # measurements, looks in a row that found nothing
        self._quiet_until = self._look_from = 0  # steps

    def moved(self) -> None:
        """Experts have moved: other bytes are on the links from here."""
        self._watch.moved()

    def changed(self, done: int, step: MeasuredStep) -> bool:
        """Whether a link has changed, after `done` steps of which this was the last; what was found is told.

        Raises:
            RankError: a rank was lost while measuring.
        """
        if not self.every:
            return False
        self._observe(step)
        try:
            return self._looked(done)
        except PlacementError as e:  # the ranks are well: they measured what no link can be, on a busy machine say
            words = f"after step {done}: links could not be measured, what is known of them stays: {e}"
            self.publish(Event("topology", words))
            self._quiet_until = self._look_from = done + QUIET * _twice(self._vain)
            self._vain += 1
            return False

    def _looked(self, done: int) -> bool:
        """Whether a link that is suspected, or was slowed, has changed."""
        if self._suspected and done >= self._quiet_until:
            return self._measure(done)
        if not self.slowed or done % self.every or done < self._look_from:
            return False
        if self._recovers():
            return self._measure(done)
        self._look_from = done + self.every * _twice(self._vain_looks)
        self._vain_looks += 1
        return False

    def _observe(self, step: MeasuredStep) -> None:
        """A step's exchanges are many, and ranks wait for each other in them: what they suspect is measured."""
        # A rank that had less to compute has waited in its exchanges for the one that had most.
        net = np.maximum(step.exchange - (step.experts.max() - step.experts), 0.0)
        found = self._watch.observe_exchange(step.sent, net)
        # An exchange through a host's memory takes as long as its processors let it: that says nothing of a link.
        wired = least_change(self.topology) < CHANGED_INSIDE
        found = [
            c for c in found if wired[[c.source, c.destination]].any() or wired[:, [c.source, c.destination]].any()
        ]
        if found:  # kept through quiet times: the watch takes a link for what it seemed to be and is silent then
            self._suspected = found[0].words

    def _recovers(self) -> bool:
        """Whether a link that was slowed seems faster now: a short measurement of those links alone."""
        pairs = sorted(self.slowed, key=lambda p: float(self.topology.bandwidth[p]) / self.slowed[p])[:LOOKED_AT]
        now = self.ranks.probe_links(self.topology, pairs, self.budget_s * GLANCE)
        faster = {p: float(now.bandwidth[p] / self.topology.bandwidth[p]) for p in pairs}
        least = least_change(self.topology)
        a, b = max(faster, key=lambda p: faster[p] / least[p])
        if faster[a, b] <= least[a, b]:
            return False
        self._suspected = f"link from rank {a} to rank {b} seemed {faster[a, b]:.1f} times faster"
        return True

    def _measure(self, done: int) -> bool:
        """All links, whole; whether one has changed."""
        old, self.topology = self.topology, probe.measured_links(self.ranks, self.budget_s)
        found = changed_links(old, self.topology)
        words = "; ".join(_phrase(old, self.topology, p) for p in list(found)[:8])
        words = words or f"measured again and found as before (suspected: {self._suspected})"
        self.publish(Event("topology", f"after step {done}: {words}", {"changed": _figures(old, self.topology, found)}))
        self._suspected, self._watch = "", LinkWatch(self.topology)
        self.keep(self.topology)
        if found:  # no quiet: until the new watch knows what is usual, and a link is slow again, ten steps pass
            self._vain = self._vain_looks = 0
            self._look_from = done + 1
            self._mark(old, found)
            return True
        self._quiet_until = done + QUIET * _twice(self._vain)
        self._look_from = max(self._look_from, self._quiet_until)
        self._vain += 1
        return False

    def _mark(self, old: Topology, found: dict[Pair, float]) -> None:
        for (a, b), factor in found.items():
            if factor > 1 and (old.measured is None or old.measured[a, b]):
                self.slowed.setdefault((a, b), float(old.bandwidth[a, b]))
        now = self.topology.bandwidth * least_change(self.topology)
        self.slowed = {p: was for p, was in self.slowed.items() if now[p] < was}


def _twice(times: int) -> int:
    return int(min(2**times, MOST))


def least_change(topology: Topology) -> npt.NDArray[np.float64]:
    """[R, R] factor by which a link must be slower or faster to have changed."""
    inside = topology.node_of[:, None] == topology.node_of
    if topology.joined is not None:
        inside &= topology.joined == 0
    return np.where(inside, CHANGED_INSIDE, CHANGED_BETWEEN)


def changed_links(old: Topology, new: Topology) -> dict[Pair, float]:
    """Links whose bandwidth is not what it was: how many times slower each is (below 1: faster), most changed first."""
    n = new.num_ranks
    known = np.isfinite(old.bandwidth) & np.isfinite(new.bandwidth) & ~np.eye(n, dtype=bool)
    factor = np.divide(old.bandwidth, new.bandwidth, out=np.ones((n, n)), where=known)
    amount = np.abs(np.log(factor))
    amount[amount <= np.log(least_change(new))] = 0.0
    order = np.argsort(-amount, axis=None, kind="stable")[: int((amount > 0).sum())]
    return {(a, b): float(factor[a, b]) for a, b in (divmod(int(i), n) for i in order)}


def _figures(old: Topology, new: Topology, pairs: Iterable[Pair]) -> list[dict[str, float]]:
    """Of each of these links what it carried before and now, bytes/s."""
    return [
        {"source": a, "destination": b, "before": float(old.bandwidth[a, b]), "now": float(new.bandwidth[a, b])}
        for a, b in pairs
    ]


def _phrase(old: Topology, new: Topology, pair: Pair) -> str:
    was, now = float(old.bandwidth[pair]), float(new.bandwidth[pair])
    how = f"{was / now:.1f} times slower" if was > now else f"{now / was:.1f} times faster"
    return f"the link from rank {pair[0]} to rank {pair[1]} is {how}: {in_words(now)} instead of {in_words(was)}"
