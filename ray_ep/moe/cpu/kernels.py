"""Compiled kernels of the CPU layer: sorting pairs, SwiGLU with its backward, segment sums. NumPy arrays in and out.

Rows are float32, or bfloat16 as its uint16 bits; sums are float32. One thread: a rank owns its cores, not its process.
T tokens, K top_k, R ranks, S experts held, N rows, P pairs; "sorted" pairs are grouped by expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload

from ray_ep.placement.compiled import kernel_with

_1, _16 = np.uint32(1), np.uint32(16)
_FIRST = np.uint16(1 << 15)
kernel = kernel_with(fastmath=True)
"""Sums may be added in any order here."""


def view(t: Any) -> Any:
    """A tensor as the kernels take it: float32, or bfloat16 as its bits."""
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def _wide(x: Any) -> Any:
    """An element, float32 or the bits of a bfloat16, -> float32."""


def _narrow(x: Any, row: Any) -> Any:
    """float32 -> element of a row of float32, or of bfloat16 bits (to nearest, ties to even)."""


@overload(_wide)
def _wide_impl(x: Any) -> Any:
    def as_it_is(x: Any) -> Any:
        return x

    def widened(x: Any) -> Any:
        return np.uint32(np.uint32(x) << _16).view(np.float32)

    return as_it_is if x == types.float32 else widened


@overload(_narrow)
def _narrow_impl(x: Any, row: Any) -> Any:
    def as_it_is(x: Any, row: Any) -> Any:
        return x

    def rounded(x: Any, row: Any) -> Any:
        bits = np.float32(x).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> _16) & _1)) >> _16)

    return as_it_is if row.dtype == types.float32 else rounded


@kernel
def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)), for loops that are vectorised: 2^r by exponent bits, the rest by a polynomial."""
    t = -x * np.float32(1.4426950408889634)
    t = min(max(t, np.float32(-126.0)), np.float32(126.0))
    r = np.floor(t + np.float32(0.5))
    f = (t - r) * np.float32(0.6931471805599453)
    p = np.float32(1 / 120) + f * np.float32(1 / 720)
    p = np.float32(1 / 6) + f * (np.float32(1 / 24) + f * p)
    p = np.float32(1.0) + f * (np.float32(1.0) + f * (np.float32(0.5) + f * p))
    power = np.int32((np.int32(r) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(1.0) / (np.float32(1.0) + p * power)


@kernel
def swiglu(gate_up: Any, weight: Any, h: Any) -> None:
    """h [n, F] = weight [n] * silu(gate) * up, from gate_up [n, 2F]."""
    n, width = h.shape
    for i in range(n):
        gate, up, out, w = gate_up[i, :width], gate_up[i, width:], h[i], weight[i]
        for j in range(width):
            g = _wide(gate[j])
            out[j] = _narrow(w * g * _sigmoid(g) * _wide(up[j]), out)


@kernel
def swiglu_backward(gate_up: Any, weight: Any, dh: Any, d_gate_up: Any, h: Any, d_weight: Any) -> None:
    """From dh [n, F], the gradient of h = weight * silu(gate) * up.

    Writes d_gate_up [n, 2F], h [n, F] again, and d_weight [n].
    """
    n, width = dh.shape
    for i in range(n):
        gate, up, d_out = gate_up[i, :width], gate_up[i, width:], dh[i]
        d_gate, d_up, out = d_gate_up[i, :width], d_gate_up[i, width:], h[i]
        w, total = weight[i], np.float32(0.0)
        for j in range(width):
            g, u, d = _wide(gate[j]), _wide(up[j]), _wide(d_out[j])
            s = _sigmoid(g)
            silu = g * s
            d_silu = s * (np.float32(1.0) + g * (np.float32(1.0) - s))
            total += d * silu * u
            d_gate[j] = _narrow(d * w * u * d_silu, d_gate)
            d_up[j] = _narrow(d * w * silu, d_up)
            out[j] = _narrow(w * silu * u, out)
        d_weight[i] = total


@kernel
def outer(a: Any, b: Any, out: Any) -> None:
    """out [M, N] = a [n, M]^T b [n, N], float32, n at least 1: for few rows, four of which are added at a time."""
    n, width = a.shape[0], out.shape[1]
    for i in range(out.shape[0]):
        row, first = out[i], 1
        if n < 4:
            for j in range(width):
                row[j] = a[0, i] * b[0, j]
        else:
            w, x, y, z, first = a[0, i], a[1, i], a[2, i], a[3, i], 4
            for j in range(width):
                row[j] = w * b[0, j] + x * b[1, j] + y * b[2, j] + z * b[3, j]
        while first + 3 < n:
            w, x, y, z = a[first, i], a[first + 1, i], a[first + 2, i], a[first + 3, i]
            for j in range(width):
                row[j] += w * b[first, j] + x * b[first + 1, j] + y * b[first + 2, j] + z * b[first + 3, j]
            first += 4
        for k in range(first, n):
            w = a[k, i]
            for j in range(width):
                row[j] += w * b[k, j]


@kernel
def few(a: Any, weight: Any, out: Any) -> None:
    """out [M, N] = a [M, K] @ weight [N, K]^T, added in float32: for few rows, at the speed of reading the weight."""
    m, width = a.shape
    x, row = np.empty((m, width), np.float32), np.empty(width, np.float32)
    for i in range(m):
        for j in range(width):
            x[i, j] = _wide(a[i, j])
    for n in range(out.shape[1]):
        for j in range(width):
            row[j] = _wide(weight[n, j])
        for i in range(m):
            one = np.float32(0.0)
            for j in range(width):
                one += x[i, j] * row[j]
            out[i, n] = _narrow(one, out[i])


@kernel
def _add(rows: Any, members: Any, total: Any) -> None:
    """total [H] += rows [N, H] of `members`."""
    for p in members:
        row = rows[p]
        for j in range(total.shape[0]):
            total[j] += _wide(row[j])


@kernel
def _round(total: Any, out: Any) -> None:
    for j in range(out.shape[0]):
        out[j] = _narrow(total[j], out)


@kernel
def sum_segments(rows: Any, start: Any, member: Any, out: Any) -> None:
    """out[i] = sum of rows[member[start[i]:start[i + 1]]], added in float32."""
    total = np.empty(rows.shape[1], np.float32)
    for i in range(out.shape[0]):
        total[:] = 0
        _add(rows, member[start[i] : start[i + 1]], total)
        _round(total, out[i])


@kernel
def sum_two(own: Any, start: Any, member: Any, back: Any, back_start: Any, back_member: Any, out: Any) -> None:
    """out[t] = sum of own rows plus sum of returned rows of token t, added in float32 and rounded once."""
    total = np.empty(out.shape[1], np.float32)
    for t in range(out.shape[0]):
        total[:] = 0
        _add(own, member[start[t] : start[t + 1]], total)
        _add(back, back_member[back_start[t] : back_start[t + 1]], total)
        _round(total, out[t])


@kernel
def serving_ranks(index: Any, routes: Any) -> Any:
    """to [T, K] int32: the rank that serves each choice of index [T, K] under routes [E, C]; -1 for no choice."""
    tokens, top_k = index.shape
    choices = routes.shape[1]
    to = np.empty((tokens, top_k), np.int32)
    for t in range(tokens):
        for k in range(top_k):
            to[t, k] = routes[index[t, k], t % choices] if index[t, k] >= 0 else -1
    return to


@kernel
def assign(index: Any, sends: Any, rank: int) -> Any:
    """to [T, K] int32: ranks for the pairs of index [T, K] (-1: nobody) so that exactly `sends` [E, R] are met.

    Where an expert's tokens are split, those stay that the rank itself may compute, then those go that travel to the
    rank anyway, for one copy then serves several experts.
    """
    tokens, top_k = index.shape
    ranks = sends.shape[1]
    left, whole = sends.copy(), _only_rank(sends)
    to = np.full((tokens, top_k), -1, np.int32)
    visits = np.zeros((tokens, ranks), np.bool_)
    for t in range(tokens):
        for k in range(top_k):
            if index[t, k] >= 0 and whole[index[t, k]] >= 0:
                to[t, k] = whole[index[t, k]]
                visits[t, to[t, k]] = True
    for anywhere in range(2):
        for t in range(tokens):
            for k in range(top_k):
                if index[t, k] >= 0 and to[t, k] < 0:
                    r = _pick(left[index[t, k]], visits[t], rank, anywhere == 1)
                    if r >= 0:
                        to[t, k] = r
                        left[index[t, k], r] -= 1
    return to


@kernel
def _only_rank(sends: Any) -> Any:
    """[E] the rank that gets all of an expert's pairs, -1 where they are split."""
    out = np.full(sends.shape[0], -1, np.int64)
    for e in range(sends.shape[0]):
        count = 0
        for r in range(sends.shape[1]):
            if sends[e, r] > 0:
                count += 1
                out[e] = r
        if count != 1:
            out[e] = -1
    return out


@kernel
def _pick(left: Any, visits: Any, rank: int, anywhere: bool) -> int:
    """A rank with room for one more pair: the token's own, else one that it visits, else any; -1 for none."""
    if left[rank] > 0:
        return rank
    for r in range(left.shape[0]):
        if left[r] > 0 and (anywhere or visits[r]):
            return r
    return -1


@kernel
def plan_send(index: Any, to: Any, ranks: int, rank: int) -> Any:
    """Who gets which token of index [T, K], given the rank of each pair, to [T, K] (-1: nobody).

    Rows and pairs are ordered by destination, the rank itself last, tokens ascending within.

    Returns:
        rows_out [R], pairs_out [R], row_token [rows], pair [P] (flat number),
        bits [P] uint16: the expert, with the highest bit set where a pair is the first of its row.
    """
    tokens, top_k = index.shape
    rows_out, pairs_out = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    last = np.full(ranks, -1, np.int64)
    for t in range(tokens):
        for k in range(top_k):
            r = to[t, k]
            if r < 0:
                continue
            pairs_out[r] += 1
            if last[r] != t:
                last[r] = t
                rows_out[r] += 1
    row_at, pair_at = np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    rows, pairs = 0, 0
    for i in range(ranks):
        r = rank if i == ranks - 1 else (i if i < rank else i + 1)
        row_at[r], pair_at[r] = rows, pairs
        rows += rows_out[r]
        pairs += pairs_out[r]
    row_token, pair, bits = np.empty(rows, np.int64), np.empty(pairs, np.int64), np.empty(pairs, np.uint16)
    last[:] = -1
    for t in range(tokens):
        for k in range(top_k):
            r = to[t, k]
            if r < 0:
                continue
            bit = np.uint16(0)
            if last[r] != t:
                last[r] = t
                row_token[row_at[r]] = t
                row_at[r] += 1
                bit = _FIRST
            pair[pair_at[r]] = t * top_k + k
            bits[pair_at[r]] = np.uint16(index[t, k]) | bit
            pair_at[r] += 1
    return rows_out, pairs_out, row_token, pair, bits


@kernel
def plan_receive(bits: Any, weight: Any, row_of: Any, experts: int, align: int) -> Any:
    """Group received pairs by expert.

    Args:
        bits: [P] as `plan_send` makes them, weight: [P], row_of: [E] local expert of an expert.
        align: rows of an expert, when they are many, are rounded up to this.

    Returns:
        offsets [S + 1], sorted_row [offsets[-1]] (0 for padding), sorted_weight (0 for padding),
        segment [N + 1] and place [P]: the pairs of row i lie at sorted places place[segment[i]:segment[i + 1]].
    """
    pairs = bits.shape[0]
    slot, count, rows = np.empty(pairs, np.int64), np.zeros(experts, np.int64), 0
    for p in range(pairs):
        slot[p] = row_of[bits[p] & ~_FIRST]
        count[slot[p]] += 1
        rows += bits[p] >> 15
    offsets = np.zeros(experts + 1, np.int64)
    for e in range(experts):
        padded = (count[e] + align - 1) // align * align
        offsets[e + 1] = offsets[e] + (padded if count[e] >= 2 * align else count[e])
    at = offsets[:-1].copy()
    sorted_row = np.zeros(offsets[experts], np.int64)
    sorted_weight = np.zeros(offsets[experts], np.float32)
    segment, place = np.zeros(rows + 1, np.int64), np.empty(pairs, np.int64)
    i = -1
    for p in range(pairs):
        i += bits[p] >> 15
        q = at[slot[p]]
        at[slot[p]] += 1
        sorted_row[q], sorted_weight[q], place[p] = i, weight[p], q
        segment[i + 1] = p + 1
    return offsets, sorted_row, sorted_weight, segment, place


@kernel
def rows_of_tokens(row_token: Any, tokens: int) -> Any:
    """Turn rows' tokens [rows] into the rows of each token: start [T + 1], member [rows]."""
    start = np.zeros(tokens + 1, np.int64)
    for t in row_token:
        start[t + 1] += 1
    for t in range(tokens):
        start[t + 1] += start[t]
    at, member = start[:-1].copy(), np.empty(row_token.shape[0], np.int64)
    for i in range(row_token.shape[0]):
        member[at[row_token[i]]] = i
        at[row_token[i]] += 1
    return start, member


def warm() -> None:
    """Compile every kernel for float32 and bfloat16, or load it from numba's cache: never inside a timed step."""
    index, routes = np.zeros((2, 2), np.int64), np.zeros((2, 1), np.int32)
    assign(index, np.full((1, 1), 4, np.int64), 0)
    _, _, row_token, pair, bits = plan_send(index, serving_ranks(index, routes), 1, 0)
    weight = np.ones(len(pair), np.float32)
    _, _, sorted_weight, segment, place = plan_receive(bits, weight, np.zeros(1, np.int64), 1, 32)
    start, member = rows_of_tokens(row_token, 2)
    outer(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), np.ones((2, 2), np.float32))
    for dtype in (np.float32, np.uint16):
        wide, narrow = np.zeros((len(sorted_weight), 8), dtype), np.zeros((len(sorted_weight), 4), dtype)
        swiglu(wide, sorted_weight, narrow)
        swiglu_backward(wide, sorted_weight, narrow, wide.copy(), narrow.copy(), sorted_weight.copy())
        sum_segments(wide, segment, place, wide[:2].copy())
        few(narrow, np.zeros((8, 4), np.uint16), wide.copy())
        sum_two(wide, segment, place, wide, start, member, wide[:2].copy())
    # bfloat16 with what lies between two products in float32
    bits, wide, narrow = np.zeros((2, 8), np.uint16), np.zeros((2, 8), np.float32), np.zeros((2, 4), np.float32)
    swiglu(bits, weight[:2], narrow)
    swiglu_backward(bits, weight[:2], narrow, wide, narrow.copy(), weight[:2].copy())
    few(bits, bits, narrow[:, :2].copy())
    few(wide, bits, bits[:, :2].copy())
