"""The whole layer as one autograd function on CPU: exchange, gated SiLU experts, combine, with a hand-written backward.

The mathematics of exchange.py with transformers' grouped kernel (tests hold them equal), for the usual layout of
weights; experts.py chooses. Saved for backward: X, one row a token copy, and G, the gate_up output; the rest is
computed again. T tokens, K top_k, H hidden, F ffn, R ranks, S experts held; rows lie by source, the rank's own last:

    tokens [T, H] -> X [N, H]
        -> per expert: gather x, G = x gate_up^T, h = w silu(g) u, Y = h down^T -> sums -> out [T, H]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe import kernels
from ray_ep.moe.exchange import Meter
from ray_ep.moe.pool import Pool

_PAIR = np.dtype([("expert", np.int16), ("weight", np.float32)], align=False)  # 6 bytes on the wire


@dataclass(frozen=True, slots=True)
class Agreed:
    """One layer's exchange, as this rank sees it. "others" are rows from or to other ranks; own rows follow them."""

    group: Group
    meter: Meter
    pool: Pool
    rows_out: list[int]  # [R] rows to each rank, 0 to oneself
    rows_in: list[int]  # [R]
    pairs_out: list[int]  # [R] pairs to each rank, 0 to oneself
    pairs_in: list[int]  # [R]
    row_token: torch.Tensor  # [others + own] token of each row of this rank's tokens
    pair: np.ndarray  # [T * K] flat number of each pair, in row order
    offsets: np.ndarray  # [S + 1] rows of each expert in G and Y
    sorted_row: torch.Tensor  # [offsets[-1]] row of X
    sorted_weight: np.ndarray  # [offsets[-1]], 0 for padding
    segment: np.ndarray  # [N + 1] pairs of each row of X
    place: np.ndarray  # [P] row of G and Y of each pair
    own_start: np.ndarray  # [T + 1] own pairs of each token, into place
    back: tuple[np.ndarray, np.ndarray]  # CSR: rows sent to others, by token

    @property
    def others_out(self) -> int:
        """Rows of this rank's tokens that go to other ranks."""
        return sum(self.rows_out)

    @property
    def others_in(self) -> int:
        """Rows of X that came from other ranks."""
        return sum(self.rows_in)

    def move(self, out: torch.Tensor, rows: torch.Tensor, give: list[int], take: list[int]) -> torch.Tensor:
        """All-to-all of rows, counted."""
        self.group.all_to_all(out, rows, take, give)
        self.meter.add(give, rows, self.group.rank)
        return out


def agree(
    index: torch.Tensor, weights: torch.Tensor, routes: np.ndarray, row_of: np.ndarray, experts: int, shared: Any
) -> Agreed:
    """Plan one layer's exchange with all ranks (collective): sizes, then 6 bytes a pair and 1 a row.

    Args:
        index, weights: [T, K]; routes: [E, C] int32; row_of: [E] local row of an expert; experts: S.
        shared: an object with group, meter and pool.
    """
    group: Group = shared.group
    index = index.long().contiguous()  # the layout that the kernels were compiled for
    size, me = group.size, group.rank
    rows_out, pairs_out, row_token, row_pairs, pair = kernels.plan_send(index.numpy(), routes, size, me)
    sizes_out = torch.from_numpy(np.stack([rows_out, pairs_out], 1))
    sizes_in = torch.empty_like(sizes_out)
    group.all_to_all(sizes_in, sizes_out, [1] * size, [1] * size)
    own_rows, own_pairs = int(rows_out[me]), int(pairs_out[me])
    given, taken = sizes_out.clone(), sizes_in
    given[me], taken[me] = 0, 0
    (rows_give, pairs_give), (rows_take, pairs_take) = given.t().tolist(), taken.t().tolist()

    sent = np.empty(len(pair), _PAIR)
    sent["expert"] = index.numpy().reshape(-1)[pair]
    sent["weight"] = weights.detach().reshape(-1).float().numpy()[pair]
    others, pairs_others = len(row_token) - own_rows, len(pair) - own_pairs
    meta = _join(row_pairs[:others], rows_give, sent[:pairs_others], pairs_give)
    give = [r + _PAIR.itemsize * p for r, p in zip(rows_give, pairs_give, strict=True)]
    take = [r + _PAIR.itemsize * p for r, p in zip(rows_take, pairs_take, strict=True)]
    received = torch.empty(sum(take), dtype=torch.uint8)
    group.all_to_all(received, meta, take, give)
    shared.meter.add(give, meta, me)
    theirs_rows, theirs = _split(received.numpy(), rows_take, pairs_take)
    in_pairs = np.concatenate([theirs, sent[pairs_others:]])
    in_rows = np.concatenate([theirs_rows, row_pairs[others:]])
    weight = np.ascontiguousarray(in_pairs["weight"])
    offsets, sorted_row, sorted_weight, segment, place = kernels.plan_receive(
        in_rows, row_of[in_pairs["expert"]], weight, experts
    )
    counts = np.zeros(len(index) + 1, np.int64)
    counts[row_token[others:] + 1] = row_pairs[others:]
    return Agreed(
        group, shared.meter, shared.pool, rows_give, rows_take, pairs_give, pairs_take,
        torch.from_numpy(row_token), pair, offsets, torch.from_numpy(sorted_row), sorted_weight, segment, place,
        np.cumsum(counts) + segment[len(in_rows) - own_rows], kernels.rows_of_tokens(row_token[:others], len(index)),
    )  # fmt: skip


class FusedExperts(torch.autograd.Function):
    """hidden [T, H], weights [T, K], gate_up [S, 2F, H], down [S, H, F], plan -> [T, H] (collective both ways).

    Forward sends tokens once a rank and returns partial sums; backward sends gradients once a rank and returns the
    tokens' gradients and those of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, plan: Agreed
    ) -> torch.Tensor:
        pool, n_others = plan.pool, plan.others_in
        x = _collect(hidden, plan)
        start = time.perf_counter()
        total, longest = int(plan.offsets[-1]), _longest(plan)
        g = pool.take(total, gate_up.shape[1], like=hidden)
        y = pool.take(total, hidden.shape[1], like=hidden)
        rows = pool.take(longest, hidden.shape[1], like=hidden)
        h = pool.take(longest, down.shape[2], like=hidden)
        for e, a, b in _experts(plan):
            part = torch.index_select(x, 0, plan.sorted_row[a:b], out=rows[: b - a])
            torch.mm(part, gate_up[e].t(), out=g[a:b])
            kernels.swiglu(_np(g[a:b]), plan.sorted_weight[a:b], _np(h[: b - a]))
            torch.mm(h[: b - a], down[e].t(), out=y[a:b])
        partial = pool.take(n_others, hidden.shape[1], like=hidden)
        kernels.sum_segments(_np(y), plan.segment[: n_others + 1], plan.place, _np(partial))
        plan.meter.expert_seconds += time.perf_counter() - start
        out = _return(partial, y, hidden, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, g, gate_up, down)
        ctx.weights = (weights.shape, weights.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        x, g, gate_up, down = ctx.saved_tensors  # first: in a checkpointed block this recomputes, and so exchanges
        plan: Agreed = ctx.plan
        pool, n_others = plan.pool, plan.others_in
        dy = _collect(d_out.contiguous(), plan)
        start = time.perf_counter()
        total, longest = int(plan.offsets[-1]), _longest(plan)
        dx = pool.take(total, x.shape[1], like=x)
        d_weight = np.empty(total, np.float32)
        d_gate_up, d_down = pool.take(*gate_up.shape, like=x), pool.take(*down.shape, like=x)
        rows = pool.take(longest, x.shape[1], like=x)
        dh, h = pool.take(longest, down.shape[2], like=x), pool.take(longest, down.shape[2], like=x)
        dg = pool.take(longest, gate_up.shape[1], like=x)
        for e, a, b in _experts(plan):
            n = b - a
            part = torch.index_select(dy, 0, plan.sorted_row[a:b], out=rows[:n])
            torch.mm(part, down[e], out=dh[:n])
            kernels.swiglu_backward(
                _np(g[a:b]), plan.sorted_weight[a:b], _np(dh[:n]), _np(dg[:n]), _np(h[:n]), d_weight[a:b]
            )
            torch.mm(part.t(), h[:n], out=d_down[e])
            torch.mm(dg[:n], gate_up[e], out=dx[a:b])
            part = torch.index_select(x, 0, plan.sorted_row[a:b], out=rows[:n])
            torch.mm(dg[:n].t(), part, out=d_gate_up[e])
        for e in np.nonzero(np.diff(plan.offsets) == 0)[0]:
            d_gate_up[e].zero_()
            d_down[e].zero_()
        partial = pool.take(n_others, x.shape[1], like=x)
        kernels.sum_segments(_np(dx), plan.segment[: n_others + 1], plan.place, _np(partial))
        plan.meter.expert_seconds += time.perf_counter() - start
        d_hidden = _return(partial, dx, d_out, plan)
        return d_hidden, _weights_home(d_weight, ctx.weights, plan), d_gate_up, d_down, None


def _collect(tokens: torch.Tensor, plan: Agreed) -> torch.Tensor:
    """tokens [T, H] -> X [N, H]: others' copies by exchange, own ones by a gather."""
    pool, out, n = plan.pool, plan.others_out, plan.others_in
    own = plan.row_token[out:]
    x = pool.take(n + len(own), tokens.shape[1], like=tokens)
    send = torch.index_select(tokens, 0, plan.row_token[:out], out=pool.take(out, tokens.shape[1], like=tokens))
    plan.move(x[:n], send, plan.rows_out, plan.rows_in)
    torch.index_select(tokens, 0, own, out=x[n:])
    return x


def _return(partial: torch.Tensor, rows: torch.Tensor, like: torch.Tensor, plan: Agreed) -> torch.Tensor:
    """Others' partial sums go home; each token's own rows and what came back for it are added: [T, H]."""
    back = plan.pool.take(plan.others_out, like.shape[1], like=like)
    plan.move(back, partial, plan.rows_in, plan.rows_out)
    out = plan.pool.take(*like.shape, like=like)
    kernels.sum_two(_np(rows), plan.own_start, plan.place, _np(back), *plan.back, _np(out))
    return out


def _weights_home(sorted_gradient: np.ndarray, shape_dtype: Any, plan: Agreed) -> torch.Tensor:
    """Gradients of the pair weights -> [T, K] at the tokens' rank."""
    shape, dtype = shape_dtype
    by_pair = torch.from_numpy(sorted_gradient[plan.place])
    foreign = sum(plan.pairs_in)
    home = torch.empty(len(plan.pair), dtype=torch.float32)
    others = sum(plan.pairs_out)
    plan.move(home[:others], by_pair[:foreign], plan.pairs_in, plan.pairs_out)
    home[others:] = by_pair[foreign:]
    out = torch.empty(len(plan.pair), dtype=torch.float32)
    out[torch.from_numpy(plan.pair)] = home
    return out.view(shape).to(dtype)


def _experts(plan: Agreed) -> list[tuple[int, int, int]]:
    """(expert row, first, end) of the experts that have pairs."""
    ends = plan.offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(ends)) if b > a]


def _longest(plan: Agreed) -> int:
    return int(np.diff(plan.offsets).max(initial=0))


def _np(t: torch.Tensor) -> np.ndarray:
    """The kernels' view of a tensor: float32, or bfloat16 as its bits."""
    array: np.ndarray = (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()
    return array


def _join(row_pairs: np.ndarray, rows: list[int], pairs: np.ndarray, counts: list[int]) -> torch.Tensor:
    """For each rank its rows' pair counts, then its pairs, as one run of bytes."""
    parts, r, p = [], 0, 0
    for n, m in zip(rows, counts, strict=True):
        parts += [row_pairs[r : r + n], pairs[p : p + m].view(np.uint8)]
        r, p = r + n, p + m
    return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *parts]))


def _split(data: np.ndarray, rows: list[int], counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `_join`: pair counts [N] and pairs [P] of all ranks."""
    at, row_parts, pair_parts = 0, [np.empty(0, np.uint8)], [np.empty(0, _PAIR)]
    for n, m in zip(rows, counts, strict=True):
        row_parts.append(data[at : at + n])
        pair_parts.append(data[at + n : at + n + m * _PAIR.itemsize].copy().view(_PAIR))
        at += n + m * _PAIR.itemsize
    return np.concatenate(row_parts), np.concatenate(pair_parts)
