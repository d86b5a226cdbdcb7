"""The search for a step's plan, compiled: fill ranks up to a level of seconds, and find the level that is best.

A dual approximation of the makespan (Hochbaum and Shmoys 1987): for one level, the busiest rank gives to ranks under
it, first to those that have the expert, then to guests, as much at once as fits; the level is found by bisection. A
higher level needs fewer guests, whose weights take time on both ends, so the lowest level is not the best one.
E experts, R ranks, G guests; `rows` is a quota transposed to [R, E].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_ep.placement.step_flows import compiled, flows, inlined, nearest, rank_seconds, single_rank

SHORTLIST = 4
"""Receivers that are looked at for a new guest before all others: those with most room."""

ROUNDS = 6
"""Most levels that are tried for one plan."""

GUEST_WEIGHT = 0.01
"""One guest a rank must make the step faster by at least this share: of plans nearly alike the one with fewer wins."""


class Rules(NamedTuple):
    """`step.StepRules` as the kernels want it; hosts of expert e are host[start[e]:start[e + 1]]."""

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


class State(NamedTuple):
    """A plan in the making, changed in place."""

    rows: Any  # [R, E]
    seconds: Any  # [R]
    pairs: Any  # [R]
    guests: Any  # [R * slots, 3]
    is_guest: Any  # bool [R, E]
    taken: Any  # [R] guests of each rank


class Move(NamedTuple):
    """Pairs of one expert that change their rank; `pairs` 0: no move."""

    gain: float
    expert: int
    to: int
    weights_from: int  # -1: the receiver has the expert
    pairs: int
    giver_after: float
    taker_after: float


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
def _try(best: Move, state: State, counts: Any, rules: Rules, level: float, way: Any) -> Move:
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
        return Move(gain, e, b, h, x, after, loaded)
    return best


@inlined
def _to_holders(a: int, state: State, made: int, counts: Any, rules: Rules, level: float) -> Move:
    """The best move from rank a to a replica or to a guest made before: no weights travel."""
    best = Move(0.0, -1, -1, -1, 0, 0.0, 0.0)
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
def _sender(e: int, b: int, rules: Rules, far: bool) -> int:
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
def _roomiest(a: int, state: State, rules: Rules, level: float, out: Any) -> int:
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
def _to_guest(a: int, state: State, counts: Any, rules: Rules, level: float, takers: Any) -> Move:
    """The best move from rank a to a new guest on one of its roomiest ranks (as many as `takers` has entries)."""
    best = Move(0.0, -1, -1, -1, 0, 0.0, 0.0)
    found = _roomiest(a, state, rules, level, takers)
    for e in range(state.rows.shape[1]):
        if state.rows[a, e] < rules.least or state.is_guest[a, e]:
            continue
        for k in range(found):
            b = takers[k]
            if not rules.holds[e, b] and not state.is_guest[b, e]:
                h = _sender(e, b, rules, False)
                if h >= 0:
                    best = _try(best, state, counts, rules, level, (e, a, b, h))
    return best


@inlined
def _apply(a: int, move: Move, state: State, made: int, rules: Rules) -> int:
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


@compiled
def fill(level: float, state: State, counts: Any, rules: Rules) -> int:
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
        made = _apply(a, move, state, made, rules)
    return made


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
                h = -1 if has else _sender(e, b, rules, True)
                if has or (h >= 0 and state.taken[b] < rules.slots):
                    best, score = Move(0.0, e, b, h, x, state.seconds[a], state.seconds[b]), (rank, x)
        if best.pairs == 0:
            break
        made = _apply(a, best, state, made, rules)
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
    moved = not _same(first, state.rows)
    if moved:
        guests, only, between, after, weights = _outcome(state, made, counts, rules)
        # The search adds up single moves; the flows as they will be have the last word.
        if after >= before * (1 - tolerance):
            state, made, moved = _fresh(first, seconds, pairs, len(state.guests)), 0, False
    if state.pairs.max() > cap:
        made = enforce_cap(state, made, rules)
        moved = not _same(first, state.rows)
    if moved or len(guests):
        guests, only, between, after, weights = _outcome(state, made, counts, rules)
    figures = (uneven, _imbalance(state.pairs, per_pair), before, after, weights)
    most = state.pairs.max() if counts.size == 0 or counts.min() >= 0 else -1
    return state.rows, guests, between, only, figures, moved, most
