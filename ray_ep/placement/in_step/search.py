"""The search for a step's plan, compiled: which level of seconds is best, and the plan filled up to it.

A dual approximation of the makespan (Hochbaum and Shmoys 1987): fill.py fills ranks up to one level, the level is
found by trials and bisection. A higher level needs fewer guests, whose weights take time on both ends, so the lowest
level is not the best one. E experts, R ranks, G guests; `rows` is a quota transposed to [R, E].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.compiled import kernel
from ray_ep.placement.in_step.fill import RuleArrays, Rules, StepState, Transfer, apply, fill, sender
from ray_ep.placement.in_step.flows import flows, nearest, rank_seconds, single_rank

MOST_LEVELS = 6
"""Levels. One plan tries at most this many."""

GUEST_WEIGHT = 0.01
"""Share of a step's time. One guest a rank must shorten the step by at least this: of nearly equal plans the one
with fewer guests wins."""


@kernel
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


@kernel
def enforce_cap(state: StepState, made: int, rules: Rules) -> int:
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
        best, score = Transfer(0.0, -1, -1, -1, 0, 0.0, 0.0), (0, 0)
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
                    best, score = Transfer(0.0, e, b, h, x, state.seconds[a], state.seconds[b]), (rank, x)
        if best.pairs == 0:
            break
        made = apply(a, best, state, made, rules)
    return made


@kernel
def _fresh(rows: Any, seconds: Any, pairs: Any, room: int) -> StepState:
    ranks = len(seconds)
    return StepState(
        rows.copy(), seconds.copy(), pairs.copy(), np.empty((room, 3), np.int64), np.zeros(rows.shape, np.bool_),
        np.zeros(ranks, np.int64),
    )  # fmt: skip


@kernel
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


@kernel
def search(rows: Any, seconds: Any, tolerance: float, counts: Any, rules: Rules) -> tuple[StepState, int]:
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
    for _ in range(MOST_LEVELS):
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


@kernel
def _sorted_guests(state: StepState, made: int) -> Any:
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


@kernel
def _same(a: Any, b: Any) -> bool:
    for r in range(a.shape[0]):
        for e in range(a.shape[1]):
            if a[r, e] != b[r, e]:
                return False
    return True


class Outcome(NamedTuple):
    """What a split of the pairs leads to."""

    guests: Any  # [G, 3]
    only: Any  # [E] of `single_rank`
    between: Any  # [R, R] pairs between ranks
    slowest: float  # seconds of the slowest rank
    weights: float  # most seconds of a rank for guests


class Found(NamedTuple):
    """A whole plan."""

    rows: Any  # [R, E]
    guests: Any  # this and the next four are those of `Outcome`
    only: Any
    between: Any
    after: float
    weights: float
    uneven: float  # slowest rank's compute over that of an even spread, before
    even: float  # after
    before: float  # slowest rank's seconds
    moved: bool  # the plan is not the nearest-replica split
    most: int  # pairs of a rank; -1: there are negative counts


@kernel
def _outcome(state: StepState, made: int, counts: Any, rules: Rules) -> Outcome:
    guests = _sorted_guests(state, made)
    only = single_rank(state.rows)
    between = flows(counts, state.rows, only, rules.node_of, -1)
    seconds = rank_seconds(between, rules.per_pair, rules.pair_seconds, guests, rules.expert_seconds)
    ranks = len(seconds)
    weights = rank_seconds(np.zeros((ranks, ranks), np.int64), rules.per_pair, rules.pair_seconds, guests,
                           rules.expert_seconds)  # fmt: skip
    return Outcome(guests, only, between, seconds.max(), weights.max())


@kernel
def _imbalance(pairs: Any, per_pair: Any) -> float:
    """Slowest rank's compute time over the time that all would take if the load were spread by their speeds."""
    even = pairs.sum() / (1.0 / per_pair).sum()
    return (pairs * per_pair).max() / even if even > 0.0 else 1.0


@kernel
def plan_step(
    counts: Any, arrays: RuleArrays, slots: int, min_pairs: int, cross: bool, cap: int, tolerance: float
) -> Found:
    """All of `balance_step` in one call, from counts [R, E]; cap: most pairs of a rank.

    Numbers come one by one, and the answer is flat: a named tuple that Python hands over costs half a microsecond.
    """
    start, host, holds, owner, node_of, per_pair, expert_seconds, pair_seconds, fast = arrays
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
    outcome = Outcome(guests, only, between, before, 0.0)
    pairs = first.sum(1)
    uneven = _imbalance(pairs, per_pair)

    state, made = search(first, seconds, tolerance, counts, rules)
    if not _same(first, state.rows):
        outcome = _outcome(state, made, counts, rules)
        # The search adds up single moves; the flows as they will be have the last word.
        if outcome.slowest >= before * (1 - tolerance):
            state, made = _fresh(first, seconds, pairs, len(state.guests)), 0
            outcome = _outcome(state, made, counts, rules)
    if state.pairs.max() > cap:
        made = enforce_cap(state, made, rules)
        outcome = _outcome(state, made, counts, rules)
    most = state.pairs.max() if counts.size == 0 or counts.min() >= 0 else -1
    moved = not _same(first, state.rows)
    guests, only, between, after, weights = outcome
    even = _imbalance(state.pairs, per_pair)
    return Found(state.rows, guests, only, between, after, weights, uneven, even, before, moved, most)
