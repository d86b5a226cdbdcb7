"""The search for a step's plan, compiled: which level of seconds is best, and the plan filled up to it.

A dual approximation of the makespan (Hochbaum and Shmoys 1987): fill.py fills ranks up to one level, the level is
found by trials and bisection. A higher level needs fewer guests, whose weights take time on both ends, so the lowest
level is not the best one. E experts, R ranks, G guests; `rows` is a quota transposed to [R, E].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.in_step.fill import Move, Rules, State, apply, fill, sender
from ray_ep.placement.in_step.flows import compiled, flows, nearest, rank_seconds, single_rank

BELOW = "a4dca6aa4b8fb11a"
"""Digest of flows.py and fill.py. numba's cache looks at the text of one file alone: without a change in this
one, it would go on with the old kernels of those (also after an upgrade, which leaves the cache where it is)."""

ROUNDS = 6
"""Most levels that are tried for one plan."""

GUEST_WEIGHT = 0.01
"""One guest a rank must make the step faster by at least this share: of plans nearly alike the one with fewer wins."""


@compiled
def even_level(seconds: Any, per_pair: Any, near: Any) -> float:
    """Seconds that the busiest group's ranks would take if its work were spread perfectly."""
    ranks, level = len(seconds), 0.0
    for r in range(ranks):
        work, speed = 0.0, 0.0
        for b in range(ranks):
            if b == r or near[r, b]:
                work += seconds[b] / per_pair[b]
                speed += 1.0 / per_pair[b]
        level = max(level, work / speed)
    return level


@compiled
def enforce_cap(state: State, made: int, rules: Rules) -> int:
    """Move pairs off ranks that have more than the cap, whatever it costs, to ranks under it that may take them.

    Ranks that have the expert first, then guests, near ranks before far ones; stops where nobody may take more.

    Returns:
        Number of guests.
    """
    ranks, experts = state.rows.shape
    for _ in range(ranks * experts):
        a = int(np.argmax(state.pairs))
        if state.pairs[a] <= rules.cap:
            break
        best, score = Move(0.0, -1, -1, -1, 0, 0.0, 0.0), (0, 0)
        for e in range(experts):
            if state.rows[a, e] == 0:
                continue
            for b in range(ranks):
                x = min(state.rows[a, e], state.pairs[a] - rules.cap, rules.cap - state.pairs[b])
                has = rules.holds[e, b] or state.is_guest[b, e]
                rank = (2 if has else 0) + (1 if rules.near[a, b] else 0)
                if x <= 0 or (rank, x) <= score:
                    continue
                h = -1 if has else sender(e, b, rules, True)
                if has or (h >= 0 and state.taken[b] < rules.slots):
                    best, score = Move(0.0, e, b, h, x, state.seconds[a], state.seconds[b]), (rank, x)
        if best.pairs == 0:
            break
        made = apply(a, best, state, made, rules)
    return made


@compiled
def _fresh(rows: Any, seconds: Any, pairs: Any, room: int) -> State:
    ranks = len(seconds)
    return State(
        rows.copy(), seconds.copy(), pairs.copy(), np.empty((room, 3), np.int64), np.zeros(rows.shape, np.bool_),
        np.zeros(ranks, np.int64),
    )  # fmt: skip


@compiled
def _guest_share(seconds: Any, level: float, rules: Rules) -> float:
    """Seconds a rank that guests will cost, were there one on each rank under the level: where the search begins."""
    ranks, takers, cost, links = len(seconds), 0, 0.0, 0
    if rules.slots == 0:
        return 0.0
    for r in range(ranks):
        takers += seconds[r] < level
        for b in range(ranks):
            if b != r and rules.near[r, b] and rules.expert_seconds[r, b] < np.inf:
                cost += rules.expert_seconds[r, b]
                links += 1
    return 2.0 * takers * cost / (max(links, 1) * ranks)


@compiled
def search(rows: Any, seconds: Any, tolerance: float, counts: Any, rules: Rules) -> tuple[State, int]:
    """The best plan over the levels tried, from the split `rows` [R, E] that takes `seconds` [R].

    Returns:
        The plan and its number of guests; the split itself where no level made the slowest rank faster.
    """
    ranks, experts = rows.shape
    room = ranks * min(rules.slots, experts)
    pairs = rows.sum(1)
    best, best_made = _fresh(rows, seconds, pairs, room), 0
    top, slack = seconds.max(), 1 + 0.25 * tolerance
    start = even_level(seconds, rules.per_pair, rules.near)
    if top <= start * (1 + tolerance):
        return best, 0
    # `low` bounds what can be reached from below: no level under it is worth a trial. Travelling pairs may come home.
    low, high, best_score = even_level(pairs * rules.per_pair, rules.per_pair, rules.near), top, top
    level = (start + _guest_share(seconds, start, rules)) * slack
    for _ in range(ROUNDS):
        state = _fresh(rows, seconds, pairs, room)
        made = fill(level, state, counts, rules)
        reached = state.seconds.max()
        score = reached * (1 + GUEST_WEIGHT * made / ranks)
        if score < best_score:
            best, best_made, best_score = state, made, score
        high = min(high, reached)
        if reached > level * (1 + 1e-9):
            low = max(low, level)
        # What these guests cost is now known: the level at which all were even is the best guess for the next round.
        even = even_level(state.seconds, rules.per_pair, rules.near)
        done = reached <= even * (1 + tolerance) and even <= start * (1 + 2 * tolerance)
        if done or high <= low * (1 + tolerance):
            break
        level = even * slack
        if not 1.002 * low < level < 0.998 * high:
            level = 0.5 * (low + high)
    return best, best_made


@compiled
def _sorted_guests(state: State, made: int) -> Any:
    """[G, 3] the guests that compute something, by (to, expert)."""
    ranks, experts = state.rows.shape
    key = np.empty(made, np.int64)
    kept = 0
    for g in range(made):
        if state.rows[state.guests[g, 2], state.guests[g, 0]] > 0:
            key[kept] = (state.guests[g, 2] * experts + state.guests[g, 0]) * ranks + state.guests[g, 1]
            kept += 1
    key = np.sort(key[:kept])
    out = np.empty((kept, 3), np.int64)
    for g in range(kept):
        out[g, 0], out[g, 1], out[g, 2] = key[g] // ranks % experts, key[g] % ranks, key[g] // (ranks * experts)
    return out


@compiled
def _same(a: Any, b: Any) -> bool:
    for r in range(a.shape[0]):
        for e in range(a.shape[1]):
            if a[r, e] != b[r, e]:
                return False
    return True


@compiled
def _outcome(state: State, made: int, counts: Any, rules: Rules) -> tuple[Any, Any, Any, float, float]:
    """guests [G, 3], `single_rank` [E], pairs between ranks [R, R], the slowest rank's seconds, the most for guests."""
    guests = _sorted_guests(state, made)
    only = single_rank(state.rows)
    between = flows(counts, state.rows, only, rules.node_of, -1)
    seconds = rank_seconds(between, rules.per_pair, rules.pair_seconds, guests, rules.expert_seconds)
    ranks = len(seconds)
    weights = rank_seconds(np.zeros((ranks, ranks), np.int64), rules.per_pair, rules.pair_seconds, guests,
                           rules.expert_seconds)  # fmt: skip
    return guests, only, between, seconds.max(), weights.max()


@compiled
def _imbalance(pairs: Any, per_pair: Any) -> float:
    """Slowest rank's compute time over the time that all would take if the load were spread by their speeds."""
    even = pairs.sum() / (1.0 / per_pair).sum()
    return (pairs * per_pair).max() / even if even > 0.0 else 1.0


@compiled
def plan(counts: Any, arrays: Any, numbers: Any) -> Any:
    """All of `balance_step` in one call.

    Args:
        counts: [R, E].
        arrays: the first eight of `Rules`, and `fast`.
        numbers: (slots, min_pairs, cross, cap, tolerance).

    Returns:
        rows [R, E], guests [G, 3], pairs between ranks [R, R], `single_rank` [E],
        (max/mean load before, after, slowest rank's seconds before, after, most seconds for guests on a rank),
        whether anything moved, most pairs of a rank (-1: there are negative counts).
    """
    start, host, holds, owner, node_of, per_pair, expert_seconds, pair_seconds, fast = arrays
    slots, min_pairs, cross, cap, tolerance = numbers
    near = np.ones_like(fast) if cross else fast
    rules = Rules(
        start, host, holds, owner, node_of, per_pair, expert_seconds, pair_seconds, near,
        min(slots, counts.shape[1]), max(min_pairs, 1), cap,
    )  # fmt: skip
    first = nearest(counts, start, host, holds, node_of)
    only = single_rank(first)
    between = flows(counts, first, only, node_of, -1)
    guests = np.empty((0, 3), np.int64)
    seconds = rank_seconds(between, per_pair, pair_seconds, guests, expert_seconds)
    before = seconds.max()
    after, weights = before, 0.0
    pairs = first.sum(1)
    uneven = _imbalance(pairs, per_pair)

    state, made = search(first, seconds, tolerance, counts, rules)
    if not _same(first, state.rows):
        guests, only, between, after, weights = _outcome(state, made, counts, rules)
        # The search adds up single moves; the flows as they will be have the last word.
        if after >= before * (1 - tolerance):
            state, made = _fresh(first, seconds, pairs, len(state.guests)), 0
            guests, only, between, after, weights = _outcome(state, made, counts, rules)
    if state.pairs.max() > cap:
        made = enforce_cap(state, made, rules)
        guests, only, between, after, weights = _outcome(state, made, counts, rules)
    moved = not _same(first, state.rows)
    figures = (uneven, _imbalance(state.pairs, per_pair), before, after, weights)
    most = state.pairs.max() if counts.size == 0 or counts.min() >= 0 else -1
    return state.rows, guests, between, only, figures, moved, most
