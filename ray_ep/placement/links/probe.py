"""Measuring links, the pure half: which pairs when, which sizes, the fit, and a topology from the fits.

No clock and no network: `time_link` is handed a function that sends, so the same code runs on real links
(ray_ep.collective.probe) and on imagined ones. R ranks, N nodes, M message sizes.

    rounds(node_of) --disjoint pairs--> time_link(ping) --timings--> fit --LinkFit--> assemble --> Topology
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.topology import Topology

Pair = tuple[int, int]
"""Two ranks: sender and receiver of a message."""

SIZES = (1, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Bytes. Messages of these sizes are tried, smallest first; a link that is too slow for its time stops earlier,
after two."""
REPEATS = (5, 9)
"""Messages. Each size is sent at least and at most this often: of five, the lower quartile is the second fastest, so
three may be disturbed."""
COMPANY = 3
"""Rounds. Whole nodes meet this often, so that each meets two others, if there are, of which one may have fewer
cards."""
OWN_CARDS = 0.75
"""Share of a rank's lone speed. A rank that keeps it while its node's others send shares no card."""
ROUND_S = 1.0
"""Seconds. A round is planned to take at most this: a 3 GB/s link is done in 30 ms, one of 10 MB/s gets to messages
of 256 KiB."""


# --- which pairs when


def tournament(players: int) -> list[list[Pair]]:
    """Rounds in which each of `players` meets each other once, at most one meeting a player and round.

    The circle method: one stays, the others turn; players - 1 rounds, or `players` where that is odd (one rests).
    """
    if players < 2:
        return []
    circle = list(range(players + players % 2))
    half, found = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        meetings = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(p), max(p)) for p in meetings if max(p) < players])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def probe_rounds(
    node_of: Sequence[int] | npt.NDArray[np.int64], samples: int | None = None, seed: int = 0
) -> list[list[Pair]]:
    """Pairs of ranks to be measured, in rounds that can each run at once.

    First all pairs inside the nodes, all nodes together. Then the pairs of nodes, each by a pair of ranks of theirs:
    no two pairs of a round share a rank, and across nodes none shares a node, for two flows on one network card would
    measure half of it. Which ranks stand for their nodes turns with the samples.

    Args:
        node_of: [R] node of each rank.
        samples: pairs of ranks measured for a pair of nodes; None: up to 32 / N, so that few nodes are measured whole
            and the number of rounds, (ranks of a node - 1) + samples * (N - 1), grows at most linearly with N.
        seed: which ranks stand for their nodes first.

    Raises:
        PlacementError: `node_of` is not a list of integers, or `samples` is below 1.
    """
    nodes = _members(node_of)
    largest = sorted((len(n) for n in nodes), reverse=True)[:2]
    most = math.prod(largest) if len(nodes) > 1 else 1
    if samples is None:
        samples = max(1, min(32 // len(nodes), most))
    if samples < 1:
        raise PlacementError(f"probe: {samples} samples of a pair of nodes, expected at least 1")
    inside = [tournament(len(n)) for n in nodes]
    plan = [
        [(node[a], node[b]) for node, games in zip(nodes, inside, strict=True) if i < len(games) for a, b in games[i]]
        for i in range(max(map(len, inside)))
    ]
    first = np.random.default_rng(seed).integers(0, 1 << 30, (len(nodes), len(nodes), 2))
    for sample in range(min(samples, most)):
        for meetings in tournament(len(nodes)):
            pairs = [_representatives(nodes[a], nodes[b], sample, first[a, b].tolist()) for a, b in meetings]
            plan.append([(min(p), max(p)) for p in pairs if p])
    return [pairs for pairs in plan if pairs]


def disjoint_rounds(node_of: Sequence[int] | npt.NDArray[np.int64], pairs: Sequence[Pair]) -> list[list[Pair]]:
    """These pairs of ranks in rounds that can each run at once, by the rules of `rounds`; first come, first placed.

    Args:
        node_of: [R] node of each rank. pairs: in any order and direction; each is measured once.

    Raises:
        PlacementError: a pair that is not of two ranks.
    """
    found: list[tuple[list[Pair], set[tuple[str, int]]]] = []
    for a, b in dict.fromkeys((min(p), max(p)) for p in pairs):
        if not 0 <= a < b < len(node_of):
            raise PlacementError(f"probe: a link from rank {a} to rank {b}, expected two of {len(node_of)} ranks")
        busy = {("rank", a), ("rank", b)}
        if node_of[a] != node_of[b]:
            busy |= {("node", int(node_of[a])), ("node", int(node_of[b]))}
        free = next((i for i, (_, taken) in enumerate(found) if not taken & busy), len(found))
        if free == len(found):
            found.append(([], set()))
        found[free][0].append((a, b))
        found[free][1].update(busy)
    return [pairs for pairs, _ in found]


def company_rounds(node_of: Sequence[int] | npt.NDArray[np.int64]) -> list[list[Pair]]:
    """Rounds in which all ranks of a node send to those of another at once: what its network cards carry in all.

    Only nodes of several ranks take part, each in `COMPANY` rounds at most.
    """
    nodes = [node for node in _members(node_of) if len(node) > 1]
    return [
        [(min(p), max(p)) for a, b in meetings for p in zip(nodes[a], nodes[b], strict=False)]
        for meetings in tournament(len(nodes))[:COMPANY]
    ]


def _representatives(one: list[int], other: list[int], sample: int, first: Pair) -> Pair | None:
    """The sample-th pair of ranks of two nodes, diagonal by diagonal, so that ranks repeat late; None: all had."""
    if sample >= len(one) * len(other):
        return None
    diagonal = sample // math.lcm(len(one), len(other))
    return one[(sample + first[0]) % len(one)], other[(sample + diagonal + first[1]) % len(other)]


def _members(node_of: Sequence[int] | npt.NDArray[np.int64]) -> list[list[int]]:
    """Ranks of each node, nodes in ascending order of their numbers."""
    of = np.asarray(node_of)
    if of.ndim != 1 or not len(of) or not np.issubdtype(of.dtype, np.integer):
        raise PlacementError(f"probe: node_of is {of.dtype} of shape {of.shape}, expected one integer a rank")
    return [np.flatnonzero(of == node).tolist() for node in np.unique(of)]


# --- one link


@dataclass(frozen=True)
class LinkFit:
    """A link in one direction: a message of n bytes takes latency + n / bandwidth."""

    latency: float  # seconds
    bandwidth: float  # bytes/s
    spread: float  # half the interquartile range of the largest messages' times over their median


def round_budget(budget_s: float, spent_s: float, rounds_left: int) -> float:
    """Seconds for the next round: an even share of what is left, at most ROUND_S; 0 where nothing is left."""
    return min(ROUND_S, max(0.0, budget_s - spent_s) / max(rounds_left, 1))


def time_link(ping: Callable[[int, int], list[float]], budget_s: float) -> dict[int, list[float]]:
    """Time messages of growing sizes over one link until the time is used up.

    Args:
        ping: (bytes n, repeats) -> seconds of each trip there with n bytes and back with one byte.
        budget_s: stop before a size that would probably pass it; but not before a message takes twice as long as one
            byte, for until then noise of a tenth in the times is more than a fifth in the bandwidth.

    Returns:
        seconds by size.
    """
    fewest, most = REPEATS
    first = ping(1, fewest)  # the first messages of a link set it up; not kept
    spent, found = sum(first), dict[int, list[float]]()
    for size in SIZES:
        expected = _expected(found, size) if found else min(first)
        seen = len(found) > 1 and _typical(found[max(found)]) > 2 * _typical(found[1])
        if seen and spent + fewest * expected > budget_s:
            break
        # A quarter of what is left: the next size takes up to four times as long.
        repeats = int(min(most, max(fewest, (budget_s - spent) / 4 / max(expected, 1e-9))))
        found[size] = ping(size, repeats)
        spent += sum(found[size])
    for size in sorted(found)[-2:]:  # what the bandwidth hangs on, again where it was disturbed
        if _spread(found[size]) > 0.1 and spent + most * _typical(found[size]) < budget_s:
            found[size] = found[size] + ping(size, most)
            spent += sum(found[size][-most:])
    return found


def in_company(alone: LinkFit, budget_s: float) -> tuple[int, int, float]:
    """(Bytes, messages, seconds of each if it were alone) to see what is left of a link while others send, too.

    Large enough that bandwidth is what counts, and many: what a link keeps is told by all of them together.
    """
    size = int(np.clip(10 * alone.latency * alone.bandwidth, 1 << 16, SIZES[-1]))
    expected = 2 * alone.latency + size / alone.bandwidth
    return size, int(np.clip(budget_s / 2 / expected, REPEATS[0], 10 * REPEATS[1])), expected


def _expected(found: Mapping[int, list[float]], size: int) -> float:
    """Seconds that a message of `size` will take, by the sizes already timed."""
    sizes = sorted(found)
    last = _typical(found[sizes[-1]])
    if len(sizes) == 1:
        return last
    slope = max(0.0, last - _typical(found[sizes[-2]])) / (sizes[-1] - sizes[-2])
    return last + slope * (size - sizes[-1])


def _typical(seconds: Sequence[float]) -> float:
    """The lower quartile: disturbances only add time, but a shaper lets a first burst pass, which the minimum is."""
    return _quantile(seconds, 0.25)


def _spread(seconds: Sequence[float]) -> float:
    """Half the interquartile range over the median."""
    return (_quantile(seconds, 0.75) - _quantile(seconds, 0.25)) / 2 / _quantile(seconds, 0.5)


def _quantile(values: Sequence[float], q: float) -> float:
    """Linear between the neighbours; np.quantile takes 100 us for three numbers, and a large cluster has many links."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def fit(timings: Mapping[int, Sequence[float]]) -> LinkFit:
    """Latency, bandwidth and spread of a link from trips there with n bytes and back with one.

    The lower quartile of each size, then least squares weighted by 1 / time^2, for errors are relative. Where the line
    misses the largest messages by more than a tenth and more than their spread, the link is not of one kind (a burst, a
    protocol that changes with the size): the bandwidth is then the slope between the two largest sizes, for large
    messages are what it is needed for. The way back is taken to have the latency of the way there: clocks are not
    compared.

    Args:
        timings: seconds by size in bytes; at least two sizes.

    Raises:
        PlacementError: fewer than two sizes, or a time that is NaN, infinite, zero or negative.
    """
    sizes = np.array(sorted(timings), np.float64)
    if len(sizes) < 2 or sizes[0] < 1:
        raise PlacementError(f"probe: times of messages of {sorted(timings)} bytes, expected at least two sizes")
    for size, times in timings.items():
        if not len(times) or not all(math.isfinite(t) and t > 0 for t in times):
            raise PlacementError(f"probe: times {list(times)} s of {size} bytes, expected positive and finite")
    typical = np.array([_typical(timings[int(n)]) for n in sizes])
    weight = typical**-2.0
    mean_n, mean_t = np.average(sizes, weights=weight), np.average(typical, weights=weight)
    slope = float(np.sum(weight * (sizes - mean_n) * (typical - mean_t)) / np.sum(weight * (sizes - mean_n) ** 2))
    base = float(mean_t - slope * mean_n)
    largest = timings[int(sizes[-1])]
    spread = _spread(largest)
    if abs(base + slope * sizes[-1] - typical[-1]) > max(0.1, 2 * spread) * typical[-1] or base < 0:
        slope = float((typical[-1] - typical[-2]) / (sizes[-1] - sizes[-2]))
        base = float(typical[0])
    if slope <= 0:  # hidden in the noise: the largest message takes at most that
        slope = float(max(2 * spread, 1e-3) * _quantile(largest, 0.5) / sizes[-1])
    return LinkFit(base / 2, 1 / slope, spread)


# --- all links


def assemble(
    node_of: Sequence[int] | npt.NDArray[np.int64],
    fits: Mapping[Pair, LinkFit],
    measured_at: float | None = None,
) -> Topology:
    """A topology from measured links; a pair of ranks without its own has the median of its pair of nodes.

    Args:
        node_of: [R] node of each rank, as it is said.
        fits: by (source, destination); a direction that is missing is taken from the other one.
        measured_at: seconds since 1970.

    Raises:
        PlacementError: a fit with NaN, negative latency or bandwidth that is not positive and finite, named by its
            ranks; two nodes without any measured link between them.
    """
    nodes, count = _members(node_of), len(node_of)
    values = np.full((3, count, count), np.nan)  # latency, bandwidth, spread
    for (a, b), f in fits.items():
        values[:, a, b] = _checked(a, b, f, count)
    measured = np.isfinite(values[0])
    values = np.where(np.isnan(values), values.transpose(0, 2, 1), values)
    for one in nodes:
        for other in nodes:
            block = np.ix_(range(3), one, other)
            values[block] = _filled(values[block], one, other)
    latency, bandwidth, spread = values
    diagonal = np.eye(count, dtype=bool)
    return Topology(
        np.where(diagonal, np.inf, bandwidth),
        np.where(diagonal, 0.0, latency),
        np.asarray(node_of, np.int64),
        spread=np.where(diagonal, 0.0, spread),
        measured=measured,
        measured_at=measured_at,
    )


def with_fits(known: Topology, fits: Mapping[Pair, LinkFit], measured_at: float) -> Topology:
    """`known` with these links, by (source, destination), as measured at that time.

    Raises:
        PlacementError: as `assemble`.
    """
    count = known.num_ranks
    spread = np.zeros((count, count)) if known.spread is None else known.spread
    measured = np.zeros((count, count), dtype=bool) if known.measured is None else known.measured
    values, measured = np.stack([known.latency, known.bandwidth, spread]), measured.copy()
    for (a, b), f in fits.items():
        values[:, a, b], measured[a, b] = _checked(a, b, f, count), True
    latency, bandwidth, spread = values
    return replace(
        known, bandwidth=bandwidth, latency=latency, spread=spread, measured=measured, measured_at=measured_at
    )


def with_lanes(alone: Topology, company: Mapping[Pair, LinkFit]) -> Topology:
    """`alone` with the lanes of its nodes, from links by (source, destination) as they were in company.

    A node that met several others has as many lanes as in the best meeting: the others' cards may be the fewer ones.

    Raises:
        PlacementError: as `assemble`.
    """
    meetings: dict[Pair, list[float]] = {}  # of two nodes: the share of its speed that each link kept
    for (a, b), f in company.items():
        bandwidth = _checked(a, b, f, alone.num_ranks)[1]
        nodes = int(alone.node_of[a]), int(alone.node_of[b])
        meetings.setdefault(nodes, []).append(bandwidth / float(alone.bandwidth[a, b]))
    ranks = np.bincount(alone.node_of)
    lanes = np.where(np.isin(np.arange(len(ranks)), list(meetings)), 1.0, ranks)
    for nodes, kept in meetings.items():
        share = min(kept)  # they send as much each: the last one's end is the end of what the node carries
        for node in nodes:
            seen = float(ranks[node]) if share >= OWN_CARDS else share * len(kept)
            lanes[node] = min(max(lanes[node], seen), ranks[node])
    shared = bool((lanes < ranks).any())
    return replace(alone, lanes=lanes[alone.node_of] if shared else None)


def _checked(a: int, b: int, f: LinkFit, count: int) -> tuple[float, float, float]:
    """(latency, bandwidth, spread) of the link from a to b; raises PlacementError where one cannot be."""
    if not (0 <= a < count and 0 <= b < count and a != b):
        raise PlacementError(f"probe: a link from rank {a} to rank {b}, expected two of {count} ranks")
    right = math.isfinite(f.latency) and f.latency >= 0 and math.isfinite(f.bandwidth) and f.bandwidth > 0
    if not right or not (math.isfinite(f.spread) and f.spread >= 0):
        raise PlacementError(
            f"probe: link from rank {a} to rank {b}: latency {f.latency:g} s, bandwidth {f.bandwidth:g} bytes/s, "
            f"spread {f.spread:g}; expected finite values, latency and spread not negative, bandwidth positive"
        )
    return f.latency, f.bandwidth, f.spread


def _filled(block: npt.NDArray[np.float64], one: list[int], other: list[int]) -> npt.NDArray[np.float64]:
    """block [3, A, B] with the gaps filled by the median over the block."""
    known = np.isfinite(block[0])
    if known.all() or (len(one) == 1 and one == other):
        return block
    if not known.any():
        raise PlacementError(f"probe: no link from ranks {one} to ranks {other} was measured")
    median = np.median(block[:, known], axis=1)
    return np.where(known, block, median[:, None, None])
