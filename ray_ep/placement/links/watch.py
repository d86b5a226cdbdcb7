"""Keeping a topology fresh from what the job sends anyway: which link is not what the topology says. Pure NumPy.

Nothing is decided here: the driver may measure a named link again, or plan anew with `LinkWatch.topology`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.links.groups import in_words
from ray_ep.placement.topology import Topology

MIN_BYTES = 1 << 16
"""Bytes. Smaller messages are ignored: they say more about the machine's scheduling than about the link."""


@dataclass(frozen=True)
class LinkChange:
    """A link that is not as the topology says."""

    source: int
    destination: int
    factor: float  # times slower than in the topology so far; below 1: faster
    sure: bool  # False: seen through whole exchanges that other links, or a late rank, would explain as well
    words: str


class LinkWatch:
    """Notices links that became slower, or recovered, by a factor over several observations.

    One slow observation may be a busy receiver, so each of the last `observations` must be slow. After a `LinkChange`
    the link's bandwidth in `topology` is the observed one, so the next change is judged against that.

    Args:
        topology: as it was measured.
        factor: slower by this much is a change; so is faster by this much.
        observations: how many in a row must agree.

    Raises:
        PlacementError: a factor of 1 or less, fewer than 1 observations.
    """

    def __init__(self, topology: Topology, factor: float = 2.0, observations: int = 5):
        if not (math.isfinite(factor) and factor > 1) or observations < 1:
            raise PlacementError(
                f"link watch: factor {factor} and {observations} observations, expected above 1 and at least 1"
            )
        self.topology, self.factor, self.observations = topology, factor, observations
        self._links: dict[tuple[int, int], deque[tuple[float, float]]] = {}  # (bytes, seconds)
        self._ranks: dict[int, deque[tuple[float, npt.NDArray[np.float64]]]] = {}  # (seconds, times said [2, R])
        self._usual: dict[int, float] = {}  # seconds of a rank's exchange over what the links say, when all was well
        self._before: dict[int, float] = {}  # that, with other bytes on the links

    def observe(self, source: int, destination: int, size: float, seconds: float) -> LinkChange | None:
        """One message of `size` bytes took `seconds`, nothing waited for.

        Raises:
            PlacementError: no such link, or numbers that are not finite, or a time that is not positive.
        """
        ranks = self.topology.num_ranks
        if not (0 <= source < ranks and 0 <= destination < ranks and source != destination):
            raise PlacementError(f"link watch: from rank {source} to {destination}, expected two of {ranks} ranks")
        if not (math.isfinite(size) and size >= 0 and math.isfinite(seconds) and seconds > 0):
            raise PlacementError(
                f"link watch: {size} bytes in {seconds} s from rank {source} to {destination}, expected finite numbers"
            )
        if size < MIN_BYTES or not np.isfinite(self.topology.bandwidth[source, destination]):
            return None
        seen = self._links.setdefault((source, destination), deque(maxlen=self.observations))
        seen.append((size, seconds))
        if len(seen) < self.observations:
            return None
        ratios = [t / self.topology.seconds(source, destination, n) for n, t in seen]
        if min(ratios) < self.factor and max(ratios) > 1 / self.factor:
            return None
        return self._change(source, destination, float(np.median(ratios)), True)

    def observe_exchange(self, sizes: npt.ArrayLike, seconds: npt.ArrayLike) -> list[LinkChange]:
        """One all-to-all of all ranks that began together (after another collective, or a barrier).

        A rank's time covers all its links, sent and received, so it is compared with their sum, and with how the two
        compared in the first exchanges. When a rank is slow every time, the link is named whose bytes explain its
        times best: one with another slow rank at the other end first, then the one whose share of bytes goes up and
        down with the times.

        Args:
            sizes: [R, R] bytes from rank (row) to rank.
            seconds: [R] of each rank, or one for all (then only the slowest rank by bytes can be meant).

        Raises:
            PlacementError: shapes that do not fit, or numbers that are not finite, or negative.
        """
        n = self.topology.num_ranks
        size = np.asarray(sizes, np.float64)
        if size.shape != (n, n) or np.ndim(seconds) > 1 or (np.ndim(seconds) and np.shape(seconds) != (n,)):
            raise PlacementError(f"link watch: bytes {size.shape} and seconds {np.shape(seconds)} do not fit {n} ranks")
        took = np.broadcast_to(np.asarray(seconds, np.float64), n)
        if not (np.isfinite(size) & (size >= 0)).all() or not (np.isfinite(took) & (took >= 0)).all():
            raise PlacementError("link watch: bytes and seconds must be finite and not negative, in every entry")
        said = np.where(size >= MIN_BYTES, self.topology.latency + size / self.topology.bandwidth, 0.0)
        np.fill_diagonal(said, 0.0)
        both = np.stack([said.T, said], 1)  # [R, 2, R] seconds that a rank's links to receive and to send should take
        whole = both.sum(2).max(1)
        ranks = np.flatnonzero(whole > 0)
        if np.ndim(seconds) == 0 and len(ranks):
            ranks = ranks[whole[ranks] == whole.max()]
        slow = {r: ratio for r in ranks.tolist() if (ratio := self._slow(r, float(took[r]), both[r]))}
        return self._blame(slow)

    def moved(self) -> None:
        """Experts have moved, and with them the bytes on the links: how a rank's time compares is learnt anew.

        But where it then compares worse by the factor, that is taken for a link that slowed meanwhile.
        """
        self._before, self._usual = {**self._before, **self._usual}, {}
        self._ranks.clear()

    def _slow(self, rank: int, took: float, said: npt.NDArray[np.float64]) -> float:
        """How much slower than usual the rank was in each of the last exchanges; 0: it was not."""
        seen = self._ranks.setdefault(rank, deque(maxlen=self.observations))
        seen.append((took, said))
        if len(seen) < self.observations:
            return 0.0
        ratios = [t / float(s.sum(1).max()) for t, s in seen]
        now = float(np.median(ratios))
        before = self._before.pop(rank, now)
        usual = self._usual.setdefault(rank, now if now < self.factor * before else before)
        # An exchange whose links all run at once is faster than their sum: then the usual falls to that.
        self._usual[rank] = usual = min(usual, now)
        # Not all of them by the whole factor: exchanges differ, and one that was quick would begin the count anew.
        slow = now >= self.factor * usual and min(ratios) >= self.factor**0.5 * usual
        return now / usual if slow else 0.0

    def _blame(self, slow: dict[int, float]) -> list[LinkChange]:
        changes: list[LinkChange] = []
        explained: set[int] = set()
        for rank in sorted(slow, key=lambda r: -slow[r]):
            if rank in explained:
                continue
            source, destination, sure = self._suspect(rank, slow)
            sure = sure and 2 * len(slow) <= max(self.topology.num_ranks, 4)  # else everybody waited for something
            seen = self._ranks[rank]
            side, other = (0, source) if destination == rank else (1, destination)
            factor = float(np.median([t / s[side, other] for t, s in seen]))
            explained |= {source, destination}
            changes.append(self._change(source, destination, max(factor, 1.0), sure))
        for rank in explained:
            self._ranks[rank].clear()
        return changes

    def _suspect(self, rank: int, slow: dict[int, float]) -> tuple[int, int, bool]:
        """(source, destination, whether no other link explains it nearly as well)."""
        seen = list(self._ranks[rank])
        took = np.array([t for t, _ in seen])
        said = np.stack([s for _, s in seen])  # [observations, 2, R]
        scores = []
        for side, other in zip(*np.nonzero((said > 0).all(0)), strict=True):
            ratio = took / said[:, side, other]
            both_slow = int(other) in slow
            scores.append((not both_slow, float(ratio.std() / ratio.mean()), int(side), int(other)))
        if not scores:  # no link carried much in all of them: the one that carried most
            side, other = np.unravel_index(int(said.sum(0).argmax()), said.shape[1:])
            scores.append((True, 0.0, int(side), int(other)))
        scores.sort()
        apart, error, side, other = scores[0]
        rivals = [s for s in scores[1:] if s[0] == apart and s[1] < 2 * error + 0.02]
        return (other, rank, not rivals) if side == 0 else (rank, other, not rivals)

    def _change(self, source: int, destination: int, factor: float, sure: bool) -> LinkChange:
        was = float(self.topology.bandwidth[source, destination])
        bandwidth = self.topology.bandwidth.copy()
        bandwidth[source, destination] = was / factor
        self.topology = replace(self.topology, bandwidth=bandwidth)
        self._links.pop((source, destination), None)
        node_of = self.topology.node_of
        place = "inside a node" if node_of[source] == node_of[destination] else "between nodes"
        how = f"{factor:.1f} times slower" if factor >= 1 else f"{1 / factor:.1f} times faster"
        words = (
            f"link from rank {source} to rank {destination} ({place}) is {how} than the topology says: "
            f"{in_words(was / factor)} instead of {in_words(was)}, over {self.observations} observations"
        )
        if not sure:
            words += f"; another link of rank {source} or {destination} may be the one: measure again"
        return LinkChange(source, destination, factor, sure, words)
