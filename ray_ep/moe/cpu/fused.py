"""The whole layer as one autograd function on CPU: exchange, gated SiLU experts, combine, with a hand-written backward.

The mathematics of exchange.py with transformers' grouped kernel (tests hold them equal), for the usual layout of
weights; experts.py chooses. Saved for backward: X, one row a token copy, and G, the gate_up output; the rest is
computed again. T tokens, K top_k, H hidden, F ffn, R ranks, S experts held; rows lie by source, the rank's own last:

    tokens [T, H] -> X [N, H]
        -> per expert: gather x, G = x gate_up^T, h = w silu(g) u, Y = h down^T -> sums -> out [T, H]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ray_ep.moe.balance.guests import Luggage, side_by_side
from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.fused_plan import Agreed
from ray_ep.moe.cpu.gemm import Packed, between, gradient, mm, widen
from ray_ep.moe.cpu.kernels import view
from ray_ep.moe.exchange.float8 import pack, unpack

_ROWS = 2048
"""Rows of an expert that are computed at once, up to half as many again: what lies between two products then stays in
the cache. A hot expert's 16 thousand took 1.2 times as long in one (packed, hidden 1024, ffn 512)."""


class FusedExperts(torch.autograd.Function):
    """hidden [T, H], weights [T, K], gate_up [S, 2F, H], down [S, H, F], plan -> [T, H] (collective both ways).

    Forward sends tokens once a rank and returns partial sums; backward sends gradients once a rank and returns the
    tokens' gradients and those of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        plan: Agreed,
        packed: tuple[Packed, Packed] | None,
        grad: bool,
    ) -> torch.Tensor:
        pool, n_others = plan.pool, plan.others_in
        guests = _borrow(gate_up, down, plan)
        stayed = ([], []) if plan.kept is None else plan.kept.rows
        ups, downs = _rows((gate_up, down), stayed)
        x = _collect(hidden, plan, forward=True)
        plan.meter.enter("experts")
        parts, total = _blocks(plan, _ROWS), int(plan.offsets[-1])
        longest = _longest(parts)
        # Without a backward to come G lives for one block, in the cache.
        g = pool.take(total if grad else longest, gate_up.shape[1], like=hidden if grad else between(hidden))
        y = pool.take(total, hidden.shape[1], like=hidden)
        rows = pool.take(longest, hidden.shape[1], like=hidden)
        h = pool.take(longest, down.shape[2], like=between(hidden))
        here = len(ups)  # experts that are: guests come last
        for e, a, b in parts:
            if e >= here:
                guests.unpack(ups, downs)
            part = torch.index_select(x, 0, plan.sorted_row[a:b], out=rows[: b - a])
            g_part = g[a:b] if grad else g[: b - a]
            _linear(part, ups, e, packed and packed[0], g_part)
            kernels.swiglu(view(g_part), plan.sorted_weight[a:b], view(h[: b - a]))
            _linear(h[: b - a], downs, e, packed and packed[1], y[a:b])
        guests.unpack(ups, downs)
        plan.arrived.extend((ups[here:], downs[here:]))
        plan.meter.enter("combine")
        partial = pool.take(n_others, hidden.shape[1], like=hidden)
        kernels.sum_segments(view(y), plan.segment[: n_others + 1], plan.place, view(partial))
        out = _return(partial, y, hidden, plan)
        plan.meter.enter("")
        if not grad:
            return out
        ctx.plan = plan
        # What this rank lent is kept as others keep what they borrowed: the same hooks of checkpointing see both.
        keep = plan.guests is not None and plan.guests.keep
        ctx.save_for_backward(x, g, gate_up, down, *((guests.sent, *ups[here:], *downs[here:]) if keep else ()))
        ctx.weights = (weights.shape, weights.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        # Read first: in a checkpointed block this recomputes, and so exchanges.
        x, g, gate_up, down, *kept = ctx.saved_tensors  # the first kept is what this rank lent: until the end
        plan: Agreed = ctx.plan
        pool, n_others = plan.pool, plan.others_in
        keep = plan.guests is not None and plan.guests.keep
        guests = Luggage() if keep else _borrow(gate_up, down, plan)
        half = 1 + len(kept) // 2
        ups, downs = _rows((gate_up, down), (kept[1:half], kept[half:]))
        dy = _collect(d_out.contiguous(), plan, forward=False)
        plan.meter.enter("experts")
        # In bfloat16 a weight's gradient is one product, whose sums are float32.
        total, held = int(plan.offsets[-1]), len(gate_up)
        parts = _blocks(plan, _ROWS if x.dtype == torch.float32 else total + 1)
        longest = _longest(parts)
        dx = pool.take(total, x.shape[1], like=x)
        d_weight = np.empty(total, np.float32)
        own = tuple(pool.take(*w.shape, like=x) for w in (gate_up, down))
        d_ups, d_downs = _rows(own, ((), ()))
        if plan.guests is not None:
            of_guests = plan.guests.new_rows(own)
            d_ups, d_downs = _rows(own, side_by_side(of_guests, own))
        rows = pool.take(longest, x.shape[1], like=x)
        wide = between(x)
        dh, h = pool.take(longest, down.shape[2], like=wide), pool.take(longest, down.shape[2], like=wide)
        dg = pool.take(longest, gate_up.shape[1], like=wide)
        for e in np.nonzero(np.diff(plan.offsets) == 0)[0]:
            d_ups[e].zero_()
            d_downs[e].zero_()

        def compute(experts: list[tuple[int, int, int]]) -> None:
            for e, a, b in experts:
                n, more = b - a, a > plan.offsets[e]
                part = widen(torch.index_select(dy, 0, plan.sorted_row[a:b], out=rows[:n]))
                mm(part, downs[e], out=dh[:n])
                between_products = view(dh[:n]), view(dg[:n]), view(h[:n])
                kernels.swiglu_backward(view(g[a:b]), plan.sorted_weight[a:b], *between_products, d_weight[a:b])
                gradient(part, h[:n], d_downs[e], more)
                mm(dg[:n], ups[e], out=dx[a:b])
                part = torch.index_select(x, 0, plan.sorted_row[a:b], out=rows[:n])
                gradient(dg[:n], part, d_ups[e], more)

        mine = [part for part in parts if part[0] < held]
        theirs = [part for part in parts if part[0] >= held]
        if not keep:  # they may still be on their way: first the rank's own
            compute(mine)
            guests.unpack(ups, downs)
        compute(theirs)
        add = plan.guests.send_home(of_guests, own) if plan.guests is not None else None
        if keep:
            compute(mine)
        plan.meter.enter("combine")
        partial = pool.take(n_others, x.shape[1], like=x)
        kernels.sum_segments(view(dx), plan.segment[: n_others + 1], plan.place, view(partial))
        by_pair = torch.from_numpy(d_weight[plan.place])
        if plan.gathered is None:
            d_hidden = _return(partial, dx, d_out, plan)
            home = plan.move(_pairs(sum(plan.pairs_out)), by_pair[: sum(plan.pairs_in)], plan.pairs_in, plan.pairs_out)
        else:
            back, home = _one_message(partial, by_pair, d_out, plan)
            d_hidden = _add_up(dx, back, d_out, plan)
        d_weights = _to_tokens(home, by_pair, ctx.weights, plan)
        if add is not None:
            add()
        plan.meter.enter("")
        return d_hidden, d_weights, *own, None, None, None


def _borrow(gate_up: torch.Tensor, down: torch.Tensor, plan: Agreed) -> Luggage:
    """The guests' weights set out; nothing if no rank has any. Where they stay they need memory of their own."""
    if plan.guests is None:
        return Luggage()
    plan.meter.enter("pack")
    return plan.guests.fetch((gate_up, down), None if plan.kept is None else plan.pool.take, plan.kept)


def _rows(first: Sequence[Any], then: Sequence[Any]) -> list[list[torch.Tensor]]:
    """Each expert's two weights (or gradients): rows of `first`, then of `then`."""
    return [[*a, *b] for a, b in zip(first, then, strict=True)]


def _linear(x: torch.Tensor, weight: list[torch.Tensor], row: int, packed: Packed | None, out: torch.Tensor) -> None:
    """out = x @ weight[row].t(); guests are not packed."""
    if packed is None or row >= packed.rows:
        mm(x, weight[row].t(), out=out)
    else:
        packed.mm(x, row, out)


def _collect(tokens: torch.Tensor, plan: Agreed, forward: bool) -> torch.Tensor:
    """tokens [T, H] -> X [N, H]: others' copies by exchange, own ones by a gather."""
    plan.meter.enter("pack")
    pool, out, n = plan.pool, plan.others_out, plan.others_in
    own = plan.row_token[out:]
    x = pool.take(n + len(own), tokens.shape[1], like=tokens)
    if forward and plan.float8:
        codes = pack(tokens)
        if plan.gathered is None:
            theirs = torch.empty(n, codes.shape[1], dtype=torch.uint8)
            plan.move(theirs, codes[plan.row_token[:out]], plan.rows_out, plan.rows_in)
        else:
            theirs = plan.gathered
        x[:n], x[n:] = unpack(theirs, x.dtype), unpack(codes[own], x.dtype)
        return x
    if forward and plan.gathered is not None:
        x[:n] = plan.gathered
    else:
        send = torch.index_select(tokens, 0, plan.row_token[:out], out=pool.take(out, tokens.shape[1], like=tokens))
        plan.move(x[:n], send, plan.rows_out, plan.rows_in)
    torch.index_select(tokens, 0, own, out=x[n:])
    return x


def _return(partial: torch.Tensor, rows: torch.Tensor, like: torch.Tensor, plan: Agreed) -> torch.Tensor:
    """Others' partial sums go home; each token's own rows and what came back for it are added: [T, H]."""
    back = plan.pool.take(plan.others_out, like.shape[1], like=like)
    return _add_up(rows, plan.move(back, partial, plan.rows_in, plan.rows_out), like, plan)


def _add_up(rows: torch.Tensor, back: torch.Tensor, like: torch.Tensor, plan: Agreed) -> torch.Tensor:
    out = plan.pool.take(*like.shape, like=like)
    kernels.sum_two(view(rows), plan.own_start, plan.place, view(back), *plan.back, view(out))
    return out


def _one_message(
    partial: torch.Tensor, by_pair: torch.Tensor, like: torch.Tensor, plan: Agreed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of rows and gradients of pair weights go home in one exchange: for few tokens each costs its latency.

    Returns the rows that came back [others out, H] and the pairs' gradients [sum(pairs_out)].
    """
    row = like.shape[1] * like.element_size()
    give = [row * r + 4 * p for r, p in zip(plan.rows_in, plan.pairs_in, strict=True)]
    take = [row * r + 4 * p for r, p in zip(plan.rows_out, plan.pairs_out, strict=True)]
    rows = torch.from_numpy(view(partial).reshape(-1).view(np.uint8)).split([row * r for r in plan.rows_in])
    gradients = torch.from_numpy(by_pair.numpy().view(np.uint8)[: 4 * sum(plan.pairs_in)])
    blocks = zip(rows, gradients.split([4 * p for p in plan.pairs_in]), strict=True)
    message = torch.cat([part for block in blocks for part in block])
    parts = plan.move(torch.empty(sum(take), dtype=torch.uint8), message, give, take).split(take)
    at = [row * r for r in plan.rows_out]
    back = torch.cat([part[:n] for part, n in zip(parts, at, strict=True)])
    back = back.view(like.dtype).view(plan.others_out, like.shape[1])
    home = torch.cat([part[n:] for part, n in zip(parts, at, strict=True)])
    return back, torch.from_numpy(home.numpy().view(np.float32))


def _to_tokens(home: torch.Tensor, by_pair: torch.Tensor, shape_dtype: Any, plan: Agreed) -> torch.Tensor:
    """Gradients of the pair weights, others' `home` and own, -> [T, K]."""
    shape, dtype = shape_dtype
    out = torch.zeros(shape, dtype=torch.float32).view(-1)
    out[torch.from_numpy(plan.pair)] = torch.cat([home, by_pair[sum(plan.pairs_in) :]])
    return out.view(shape).to(dtype)


def _pairs(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32)


def _blocks(plan: Agreed, rows: int) -> list[tuple[int, int, int]]:
    """(expert row, first, end) of the experts that have pairs, about `rows` of them at a time."""
    found = []
    for e, (a, b) in enumerate(pairwise(plan.offsets.tolist())):
        while b - a >= rows + rows // 2:
            found.append((e, a, a + rows))
            a += rows
        if b > a:
            found.append((e, a, b))
    return found


def _longest(blocks: list[tuple[int, int, int]]) -> int:
    return max((b - a for _, a, b in blocks), default=0)
