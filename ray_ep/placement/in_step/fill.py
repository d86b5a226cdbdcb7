"""Fill ranks up to a level of seconds, compiled: the busiest rank gives to ranks under the level, until none is above.

First to ranks that have the expert, then to new guests, as much at once as fits. Which level is best is found in
search.py. E experts, R ranks; `rows` is a quota transposed to [R, E].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.compiled import inlined, kernel

SHORTLIST = 4
"""Ranks. A new guest is first sought among this many with most room, then among all."""


class RuleArrays(NamedTuple):
    """The arrays of a `rules.StepRules`; hosts of expert e are host[start[e]:start[e + 1]]."""

    start: Any  # [E + 1]
    host: Any
    holds: Any  # bool [E, R]
    owner: Any  # [E]
    node_of: Any  # [R]
    per_pair: Any  # [R]
    expert_seconds: Any  # [R, R]
    pair_seconds: Any  # [R, R]
    fast: Any  # bool [R, R]


class Rules(NamedTuple):
    """What one search goes by: those, and what the caller of `balance_step` asks for."""

    start: Any  # [E + 1]
    host: Any
    holds: Any  # bool [E, R]
    owner: Any  # [E]
    node_of: Any  # [R]
    per_pair: Any  # [R]
    expert_seconds: Any  # [R, R]
    pair_seconds: Any  # [R, R]
    near: Any  # bool [R, R] pairs and guests may move from row to column
    slots: Any
    least: Any  # fewest pairs of a guest, at least 1
    cap: Any  # most pairs of a rank


class StepState(NamedTuple):
    """A plan in the making, changed in place."""

    rows: Any  # [R, E]
    seconds: Any  # [R]
    pairs: Any  # [R]
    guests: Any  # [R * slots, 3]
    is_guest: Any  # bool [R, E]
    taken: Any  # [R] guests of each rank


class Transfer(NamedTuple):
    """Pairs of one expert that change their rank; `pairs` 0: no move."""

    gain: float
    expert: int
    to: int
    weights_from: int  # -1: the receiver has the expert
    pairs: int
    giver_after: float
    taker_after: float


@inlined
def _kinds(counts: Any, rows: Any, e: int, a: int, b: int, most: int) -> tuple[int, int, int]:
    """Pairs of expert e on rank a that come from b, from others, from a itself (`flows` order); `most` in all."""
    q = rows[a, e]
    own = min(counts[a, e], q)
    home = min(max(counts[b, e] - rows[b, e], 0), q - own)
    others = min(q - own - home, most - min(home, most))
    home = min(home, most)
    return home, others, min(own, most - home - others)


@inlined
def _portion(giver: Any, taker: Any, kinds: Any, travel: float, level: float, least: int) -> tuple[int, float, float]:
    """How many pairs to move so that the giver comes down to `level` and the taker stays under it.

    Args:
        giver, taker: (seconds so far, seconds a pair).
        kinds: pairs of each kind, see `_kinds`: the first save their way, the last begin to travel.
        travel: seconds that a travelling pair costs on each of its ends.
        least: move at least so many, if the taker has room.

    Returns:
        pairs, giver's seconds after, taker's seconds after
    """
    x, a, b = 0, giver[0], taker[0]
    for kind in range(3):
        if kinds[kind] == 0:
            continue
        off = giver[1] - travel if kind == 2 else giver[1] + travel
        on = taker[1] - travel if kind == 0 else taker[1] + travel
        want = np.ceil((a - level) / off) if off > 0.0 else 0.0
        want = max(want, float(least - x))
        room = np.floor((level - b) / on) if on > 0.0 else float(kinds[kind])
        take = int(max(min(float(kinds[kind]), want, room), 0.0))
        x += take
        a -= take * off
        b += take * on
        if take < kinds[kind]:
            break
    return x, a, b


@inlined
def _try(best: Transfer, state: StepState, counts: Any, rules: Rules, level: float, way: Any) -> Transfer:
    """The better of `best` and the move `way` = (expert, from, to, rank that sends the weights or -1)."""
    e, a, b, h = way  # a sender of weights may rise above the giver: it is helped next, the score of the level decides
    top, cost, least = state.seconds[a], 0.0, 1
    if h >= 0:
        cost, least = rules.expert_seconds[h, b], rules.least
    kinds = _kinds(counts, state.rows, e, a, b, rules.cap - state.pairs[b])
    giver = (top + cost if h == a else top, rules.per_pair[a])
    taker = (state.seconds[b] + cost, rules.per_pair[b])
    x, after, loaded = _portion(giver, taker, kinds, rules.pair_seconds[a, b], level, least)
    # What the receiver does beside computing (weights, travelling pairs) counts against the move.
    gain = top - after - (loaded - state.seconds[b] - x * rules.per_pair[b])
    if x >= least and after < top and loaded < top and (best.pairs == 0 or gain > best.gain):
        return Transfer(gain, e, b, h, x, after, loaded)
    return best


@inlined
def _to_holders(a: int, state: StepState, made: int, counts: Any, rules: Rules, level: float) -> Transfer:
    """The best move from rank a to a replica or to a guest made before: no weights travel."""
    best = Transfer(0.0, -1, -1, -1, 0, 0.0, 0.0)
    for e in range(state.rows.shape[1]):
        first, last = rules.start[e], rules.start[e + 1]
        if state.rows[a, e] == 0 or state.is_guest[a, e] or last - first < 2:
            continue
        for k in range(first, last):
            b = rules.host[k]
            if b != a and rules.near[a, b] and state.seconds[b] < level:
                best = _try(best, state, counts, rules, level, (e, a, b, -1))
    for g in range(made):
        e, b = state.guests[g, 0], state.guests[g, 2]
        if state.rows[a, e] > 0 and not state.is_guest[a, e] and rules.near[a, b] and state.seconds[b] < level:
            best = _try(best, state, counts, rules, level, (e, a, b, -1))
    return best


@inlined
def sender(e: int, b: int, rules: Rules, far: bool) -> int:
    """The rank that sends expert e's weights to b: the cheapest that holds them, the owner among equals; -1: none.

    `far`: over links that are not fast, too.
    """
    best, cost = -1, np.inf
    for k in range(rules.start[e], rules.start[e + 1]):
        h = rules.host[k]
        c = rules.expert_seconds[h, b]
        if (far or rules.near[h, b]) and (c < cost or (c == cost and c < np.inf and h == rules.owner[e])):
            best, cost = h, c
    return best


@inlined
def _roomiest(a: int, state: StepState, rules: Rules, level: float, out: Any) -> int:
    """Fill `out` with the ranks that may take a guest from a's load, most room in pairs first; returns how many."""
    found, size = 0, len(out)
    for b in range(len(state.seconds)):
        if b == a or not rules.near[a, b] or state.taken[b] >= rules.slots or state.seconds[b] >= level:
            continue
        room = (level - state.seconds[b]) / rules.per_pair[b]
        k = found if found < size else size - 1
        if found == size and room <= (level - state.seconds[out[k]]) / rules.per_pair[out[k]]:
            continue
        while k > 0 and room > (level - state.seconds[out[k - 1]]) / rules.per_pair[out[k - 1]]:
            out[k] = out[k - 1]
            k -= 1
        out[k] = b
        found = min(found + 1, size)
    return found


@inlined
def _to_guest(a: int, state: StepState, counts: Any, rules: Rules, level: float, takers: Any) -> Transfer:
    """The best move from rank a to a new guest on one of its roomiest ranks (as many as `takers` has entries)."""
    best = Transfer(0.0, -1, -1, -1, 0, 0.0, 0.0)
    found = _roomiest(a, state, rules, level, takers)
    for e in range(state.rows.shape[1]):
        if state.rows[a, e] < rules.least or state.is_guest[a, e]:
            continue
        for k in range(found):
            b = takers[k]
            if not rules.holds[e, b] and not state.is_guest[b, e]:
                h = sender(e, b, rules, False)
                if h >= 0:
                    best = _try(best, state, counts, rules, level, (e, a, b, h))
    return best


@inlined
def apply(a: int, move: Transfer, state: StepState, made: int, rules: Rules) -> int:
    """Do the move; returns the number of guests."""
    state.rows[a, move.expert] -= move.pairs
    state.rows[move.to, move.expert] += move.pairs
    state.pairs[a] -= move.pairs
    state.pairs[move.to] += move.pairs
    state.seconds[a], state.seconds[move.to] = move.giver_after, move.taker_after
    h = move.weights_from
    if h < 0:
        return made
    state.guests[made, 0], state.guests[made, 1], state.guests[made, 2] = move.expert, h, move.to
    state.is_guest[move.to, move.expert] = True
    state.taken[move.to] += 1
    if h != a:
        state.seconds[h] += rules.expert_seconds[h, move.to]
    return made + 1


@kernel
def fill(level: float, state: StepState, counts: Any, rules: Rules) -> int:
    """Bring every rank down to `level` seconds, the busiest first; ends at the first that nobody can help.

    Returns:
        Number of guests made.
    """
    ranks, experts = state.rows.shape
    made = 0
    few, all_ = np.empty(min(SHORTLIST, ranks), np.int64), np.empty(ranks, np.int64)
    for _ in range(8 * ranks + experts):
        a = int(np.argmax(state.seconds))
        if state.seconds[a] <= level * (1 + 1e-9):
            break
        move = _to_holders(a, state, made, counts, rules, level)
        if move.pairs == 0 and rules.slots > 0:
            move = _to_guest(a, state, counts, rules, level, few)
            if move.pairs == 0 and ranks > SHORTLIST:
                move = _to_guest(a, state, counts, rules, level, all_)
        if move.pairs == 0:
            break
        made = apply(a, move, state, made, rules)
    return made
