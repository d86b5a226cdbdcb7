"""The fused body: a layer as one autograd function on CPU: exchange, gated SiLU experts, combine, backward by hand.

The mathematics of the grouped body (tests hold them equal), for the usual layout of weights; rows travel by rows.py.
Saved for backward: X, one row a token copy, and G, the gate_up output; the rest is
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

from ray_ep.moe.balance.guests import ExpertMessage, side_by_side
from ray_ep.moe.balance.step import StepBalance, balanced
from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.gemm import Gemm, Packed
from ray_ep.moe.cpu.kernels import view
from ray_ep.moe.cpu.plan import FusedPlan, Gatherer, agree
from ray_ep.moe.cpu.rows import collect, send_back, send_home
from ray_ep.moe.layout import is_gated_silu
from ray_ep.moe.site import Site

_ROWS = 2048
"""Rows of an expert that are computed at once, up to half as many again: what lies between two products then stays in
the cache. A hot expert's 16 thousand took 1.2 times as long in one (packed, hidden 1024, ffn 512)."""


class FusedBody:
    """The body of `is_plain` layers on CPU.

    Args:
        site: of the layer.
        few: every token travels to every rank with its pairs, for few tokens; without balance.
    """

    def __init__(self, site: Site, few: bool = False):
        self.site, self.gatherer = site, Gatherer(site) if few else None

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        gate_up, down, balance = module.gate_up_proj, module.down_proj, None
        if self.gatherer is not None:
            plan = self.gatherer.gather(hidden, index, weights)
        else:
            balance = balanced(self.site, [gate_up, down], hidden, index, stays=True)
            plan = agree(self.site, hidden, index, weights, balance)
        self.site.count_pairs(len(plan.by_expert.place))
        grad = torch.is_grad_enabled()
        packed = None if grad else self._packed()
        out: torch.Tensor = FusedExperts.apply(hidden, weights, gate_up, down, plan, packed, grad)  # type: ignore[no-untyped-call]
        if balance is not None and balance.resident is not None:
            self._settle(balance, plan.extra.arrived)
        return out

    def _packed(self) -> tuple[Packed, Packed] | None:
        inference = self.site.shared.passes.now.inference
        return None if inference is None else inference.packed.get(self.site.index)

    def _settle(self, balance: StepBalance, arrived: list[list[torch.Tensor]]) -> None:
        """Guests of this pass stay, packed like the rank's own experts."""
        assert balance.resident is not None
        stay = balance.resident.settle(balance.plan, balance.guests, arrived)
        for packed, new in zip(self._packed() or (), arrived, strict=False):
            for row in new:
                packed.append(row)
        if not stay:
            for packed in self._packed() or ():
                packed.cut(self.site.slots.held)


def is_plain(module: Any, hidden: torch.Tensor) -> bool:
    """Whether the fused body computes this layer: CPU, gated SiLU in the usual layout, float32 or bfloat16."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and is_gated_silu(module)
        and bool(module.gate_up_proj.dtype == hidden.dtype)
    )


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
        plan: FusedPlan,
        packed: tuple[Packed, Packed] | None,
        grad: bool,
    ) -> torch.Tensor:
        pool, gemm, n_others, ours = plan.pool, plan.gemm, plan.others_in, plan.by_expert
        guests = _borrow(gate_up, down, plan)
        stayed = ([], []) if plan.extra.resident is None else plan.extra.resident.rows
        ups, downs = _rows((gate_up, down), stayed)
        x = collect(hidden, plan, forward=True)
        plan.traffic.meter.enter("experts")
        parts, total = _blocks(ours.offsets, _ROWS), int(ours.offsets[-1])
        longest = _longest(parts)
        # Without a backward to come G lives for one block, in the cache.
        g = pool.take(total if grad else longest, gate_up.shape[1], like=hidden if grad else gemm.between(hidden))
        y = pool.take(total, hidden.shape[1], like=hidden)
        rows = pool.take(longest, hidden.shape[1], like=hidden)
        h = pool.take(longest, down.shape[2], like=gemm.between(hidden))
        here = len(ups)  # experts that are: guests come last
        for e, a, b in parts:
            if e >= here:
                guests.unpack(ups, downs)
            part = torch.index_select(x, 0, ours.row[a:b], out=rows[: b - a])
            g_part = g[a:b] if grad else g[: b - a]
            _linear(gemm, part, ups, e, packed and packed[0], g_part)
            kernels.swiglu(view(g_part), ours.weight[a:b], view(h[: b - a]))
            _linear(gemm, h[: b - a], downs, e, packed and packed[1], y[a:b])
        guests.unpack(ups, downs)
        plan.extra.arrived.extend((ups[here:], downs[here:]))
        plan.traffic.meter.enter("combine")
        partial = pool.take(n_others, hidden.shape[1], like=hidden)
        kernels.sum_segments(view(y), ours.segment[: n_others + 1], ours.place, view(partial))
        out = send_back(partial, y, hidden, plan)
        plan.traffic.meter.enter("")
        if not grad:
            return out
        ctx.plan = plan
        # What this rank lent is kept as others keep what they borrowed: the same hooks of checkpointing see both.
        lent = plan.extra.guests
        keep = lent is not None and lent.keep
        ctx.save_for_backward(x, g, gate_up, down, *((guests.sent, *ups[here:], *downs[here:]) if keep else ()))
        ctx.weights = (weights.shape, weights.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        # Read first: in a checkpointed block this recomputes, and so exchanges.
        x, g, gate_up, down, *kept = ctx.saved_tensors  # the first kept is what this rank lent: until the end
        plan: FusedPlan = ctx.plan
        pool, gemm, n_others, ours, lent = plan.pool, plan.gemm, plan.others_in, plan.by_expert, plan.extra.guests
        keep = lent is not None and lent.keep
        guests = ExpertMessage() if keep else _borrow(gate_up, down, plan)
        half = 1 + len(kept) // 2
        ups, downs = _rows((gate_up, down), (kept[1:half], kept[half:]))
        dy = collect(d_out.contiguous(), plan, forward=False)
        plan.traffic.meter.enter("experts")
        # In bfloat16 a weight's gradient is one product, whose sums are float32.
        total, held = int(ours.offsets[-1]), len(gate_up)
        parts = _blocks(ours.offsets, _ROWS if x.dtype == torch.float32 else total + 1)
        longest = _longest(parts)
        dx = pool.take(total, x.shape[1], like=x)
        d_weight = np.empty(total, np.float32)
        own = tuple(pool.take(*w.shape, like=x) for w in (gate_up, down))
        d_ups, d_downs = _rows(own, ((), ()))
        train_up, train_down = ctx.needs_input_grad[2:4]  # a frozen weight costs no product
        home = lent if train_up or train_down else None
        if lent is not None:
            of_guests = lent.new_rows(own)
            d_ups, d_downs = _rows(own, side_by_side(of_guests, own))
        rows = pool.take(longest, x.shape[1], like=x)
        wide = gemm.between(x)
        dh, h = pool.take(longest, down.shape[2], like=wide), pool.take(longest, down.shape[2], like=wide)
        dg = pool.take(longest, gate_up.shape[1], like=wide)
        for e in np.nonzero(np.diff(ours.offsets) == 0)[0]:
            d_ups[e].zero_()
            d_downs[e].zero_()

        def compute(experts: list[tuple[int, int, int]]) -> None:
            for e, a, b in experts:
                n, more = b - a, a > ours.offsets[e]
                part = gemm.widen(torch.index_select(dy, 0, ours.row[a:b], out=rows[:n]))
                gemm.mm(part, downs[e], out=dh[:n])
                between_products = view(dh[:n]), view(dg[:n]), view(h[:n])
                kernels.swiglu_backward(view(g[a:b]), ours.weight[a:b], *between_products, d_weight[a:b])
                if train_down:
                    gemm.gradient(part, h[:n], d_downs[e], more)
                gemm.mm(dg[:n], ups[e], out=dx[a:b])
                if train_up:
                    part = torch.index_select(x, 0, ours.row[a:b], out=rows[:n])
                    gemm.gradient(dg[:n], part, d_ups[e], more)

        mine = [part for part in parts if part[0] < held]
        theirs = [part for part in parts if part[0] >= held]
        if not keep:  # they may still be on their way: first the rank's own
            compute(mine)
            guests.unpack(ups, downs)
        compute(theirs)
        add = home.send_home(of_guests, own) if home is not None else None
        if keep:
            compute(mine)
        plan.traffic.meter.enter("combine")
        partial = pool.take(n_others, x.shape[1], like=x)
        kernels.sum_segments(view(dx), ours.segment[: n_others + 1], ours.place, view(partial))
        d_hidden, d_weights = send_home(partial, dx, d_weight, d_out, ctx.weights, plan)
        if add is not None:
            add()
        plan.traffic.meter.enter("")
        d_own = (d if wanted else None for d, wanted in zip(own, (train_up, train_down), strict=True))
        return d_hidden, d_weights, *d_own, None, None, None


def _borrow(gate_up: torch.Tensor, down: torch.Tensor, plan: FusedPlan) -> ExpertMessage:
    """The guests' weights set out; nothing if no rank has any. Where they stay they need memory of their own."""
    guests, resident = plan.extra.guests, plan.extra.resident
    if guests is None:
        return ExpertMessage()
    plan.traffic.meter.enter("pack")
    return guests.fetch((gate_up, down), None if resident is None else plan.pool.take, resident)


def _rows(first: Sequence[Any], then: Sequence[Any]) -> list[list[torch.Tensor]]:
    """Each expert's two weights (or gradients): rows of `first`, then of `then`."""
    return [[*a, *b] for a, b in zip(first, then, strict=True)]


def _linear(
    gemm: Gemm, x: torch.Tensor, weight: list[torch.Tensor], row: int, packed: Packed | None, out: torch.Tensor
) -> None:
    """out = x @ weight[row].t(); guests are not packed."""
    if packed is None or row >= packed.rows:
        gemm.mm(x, weight[row].t(), out=out)
    else:
        packed.mm(x, row, out)


def _blocks(offsets: np.ndarray, rows: int) -> list[tuple[int, int, int]]:
    """(expert row, first, end) of the experts that have pairs, about `rows` of them at a time."""
    found = []
    for e, (a, b) in enumerate(pairwise(offsets.tolist())):
        while b - a >= rows + rows // 2:
            found.append((e, a, a + rows))
            a += rows
        if b > a:
            found.append((e, a, b))
    return found


def _longest(blocks: list[tuple[int, int, int]]) -> int:
    return max((b - a for _, a, b in blocks), default=0)
