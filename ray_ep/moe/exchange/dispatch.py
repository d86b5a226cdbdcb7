"""Dispatch and combine: each token travels once per destination rank, one weighted partial sum comes back.

The autograd pair of the exchange and its plan. No experts here (grouped.py), no models (parallelize.py).
T tokens of this rank, K top_k, E experts, R ranks, H hidden;
N token copies received, P (token, expert) pairs received.

    tokens [T, H] --dispatch--> rows [N, H] --experts, weights--> partial [N, H] --combine--> out [T, H]
    rows lie rank-major: all copies from rank 0, then rank 1, ... each block in token order
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ray_ep.moe.exchange.float8 import pack, unpack
from ray_ep.moe.exchange.meter import MeteredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much goes to each rank and comes from each, lists over R: rows (token copies) and (token, expert) pairs."""

    rows_out: list[int]
    rows_in: list[int]
    pairs_out: list[int]
    pairs_in: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOrder:
    """In which order one rank's tokens are sent: rank-major, tokens ascending."""

    tokens: int  # T
    token: torch.Tensor  # [sum(rows_out)] token of each row
    pair: torch.Tensor  # [sum(pairs_out)] flat number in [T, K] of each pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPairs:
    """What one rank has to compute, in the order in which it comes."""

    row: torch.Tensor  # [P] received row, ascending
    expert: torch.Tensor  # [P] expert id


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """The plan of one layer's exchange, seen from one rank."""

    sizes: Sizes  # what stays on the rank included
    order: SendOrder
    received: ReceivedPairs
    traffic: MeteredGroup = field(repr=False)
    float8: bool = False


def plan_dispatch(
    top_k_index: torch.Tensor, to: torch.Tensor, traffic: MeteredGroup, float8: bool = False
) -> DispatchPlan:
    """Agree with all ranks on one layer's exchange (collective).

    Args:
        top_k_index: [T, K] expert ids, -1 for no choice; T may be 0 and may differ between ranks.
        to: [T, K] the rank that serves each choice.
        float8: dispatch tokens in 8 bits.
    """
    traffic.meter.enter("route")
    tokens, top_k = top_k_index.shape
    device, size = top_k_index.device, traffic.size
    valid = top_k_index >= 0
    to = torch.where(valid, to, size)  # R for none
    visits = torch.zeros(tokens, size + 1, dtype=torch.int64, device=device).scatter_(1, to, 1)[:, :size]
    pair_to = to.reshape(-1)
    pairs = torch.zeros(size + 1, dtype=torch.int64, device=device).scatter_add_(0, pair_to, torch.ones_like(pair_to))
    sizes_out = torch.stack([visits.sum(0), pairs[:size]], 1)  # [R, 2]
    sizes_in = traffic.swap_sizes(sizes_out)
    traffic.group.wait()
    both = torch.cat([sizes_out, sizes_in]).tolist()  # the one time that the host waits for the device
    (rows_out, pairs_out), (rows_in, pairs_in) = zip(*both[:size], strict=True), zip(*both[size:], strict=True)
    sizes = Sizes(
        rows_out=list(rows_out), rows_in=list(rows_in), pairs_out=list(pairs_out), pairs_in=list(pairs_in)
    )  # fmt: skip

    # Rank-major, tokens ascending: stable sorts, cut to the sizes that the host knows.
    send_token = torch.argsort(1 - visits.t().reshape(-1), stable=True)[: sum(rows_out)] % max(tokens, 1)
    pair_order = torch.argsort(pair_to, stable=True)[: sum(pairs_out)]
    row_in_block = (visits.cumsum(0) - 1)[pair_order // max(top_k, 1), pair_to[pair_order]]
    meta_out = torch.stack([top_k_index.reshape(-1)[pair_order], row_in_block], 1).to(torch.int32)
    meta_in = traffic.all_to_all(meta_out, sizes.pairs_out, sizes.pairs_in)
    start = sizes_in[:, 0].cumsum(0) - sizes_in[:, 0]  # first row of each source
    block = torch.repeat_interleave(start, sizes_in[:, 1], output_size=sum(pairs_in))
    return DispatchPlan(
        sizes=sizes,
        order=SendOrder(tokens=tokens, token=send_token, pair=pair_order),
        received=ReceivedPairs(row=meta_in[:, 1].long() + block, expert=meta_in[:, 0].long()),
        traffic=traffic,
        float8=float8,
    )


def dispatch(tokens: torch.Tensor, weights: torch.Tensor, plan: DispatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [T, H], weights [T, K] -> rows [N, H], pair weights [P] (collective, forward and backward).

    Sends each token once per destination rank forward; gradients of the copies return and are summed backward.
    """
    rows, pair_weights = _Dispatch.apply(tokens, weights, plan)  # type: ignore[no-untyped-call]
    return rows, pair_weights


def combine(partial: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """partial [N, H], one weighted sum a received row -> out [T, H] (collective, forward and backward).

    Returns the partial sums and adds them forward; sends each token's gradient once per rank backward.
    """
    out: torch.Tensor = _Combine.apply(partial, plan)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, plan: DispatchPlan) -> Any:
        ctx.plan, ctx.weights_shape, ctx.weights_dtype = plan, weights.shape, weights.dtype
        rows = tokens[plan.order.token]
        rows = unpack(_rows_there(pack(rows), plan), rows.dtype) if plan.float8 else _rows_there(rows, plan)
        pair_weights = weights.reshape(-1)[plan.order.pair]
        pair_weights = plan.traffic.all_to_all(pair_weights, plan.sizes.pairs_out, plan.sizes.pairs_in)
        ctx.set_materialize_grads(True)
        return rows, pair_weights

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor, d_pair_weights: torch.Tensor) -> Any:
        plan: DispatchPlan = ctx.plan
        plan.traffic.meter.enter("combine")
        d_tokens = _rows_back(d_rows, plan)
        back = plan.traffic.all_to_all(d_pair_weights.contiguous(), plan.sizes.pairs_in, plan.sizes.pairs_out)
        d_weights = back.new_zeros(ctx.weights_shape).view(-1)
        d_weights[plan.order.pair] = back
        plan.traffic.meter.enter("")
        return d_tokens, d_weights.view(ctx.weights_shape).to(ctx.weights_dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(plan.order.token)
        return _rows_back(partial, plan)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        # In a checkpointed block reading a saved tensor starts the recomputation, which exchanges: it must come before
        # this exchange on every rank, also on one without pairs, whose experts have saved nothing.
        plan, _ = ctx.plan, ctx.saved_tensors
        plan.traffic.meter.enter("pack")
        d_partial = _rows_there(d_out[plan.order.token], plan)
        plan.traffic.meter.enter("experts")  # their backward runs from here to the dispatch's
        return d_partial, None


def _rows_there(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Rows of this rank's tokens [sum(rows_out), ...] -> those that it receives [N, ...]."""
    return plan.traffic.all_to_all(rows.contiguous(), plan.sizes.rows_out, plan.sizes.rows_in)


def _rows_back(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Received rows [N, H] go home and are added up per token -> [T, H], in float32: bfloat16 would round at each."""
    back = plan.traffic.all_to_all(rows.contiguous(), plan.sizes.rows_in, plan.sizes.rows_out)
    out = torch.zeros(plan.order.tokens, back.shape[1], dtype=torch.float32, device=back.device)
    return out.index_add_(0, plan.order.token, back.float()).to(back.dtype)
