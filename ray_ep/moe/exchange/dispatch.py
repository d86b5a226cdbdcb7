"""Dispatch and combine: each token travels once per destination rank, one weighted partial sum comes back.

The autograd pair of the exchange and its plan. No experts here (grouped.py), no models (parallelize.py).
T tokens of this rank, K top_k, E experts, R ranks, H hidden;
N token copies received, P (token, expert) pairs received.

    tokens [T, H] --dispatch--> rows [N, H] --experts, weights--> partial [N, H] --combine--> out [T, H]
    rows lie rank-major: all copies from rank 0, then rank 1, ... each block in token order

A rank alone has nothing to agree on: its rows are its tokens, and nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ray_ep.moe.exchange.columns import columns
from ray_ep.moe.exchange.float8 import pack, unpack
from ray_ep.moe.exchange.meter import MeteredGroup
from ray_ep.moe.exchange.segments import Segments, add_up, order_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much goes to each rank and comes from each, lists over R: rows (token copies) and (token, expert) pairs."""

    rows_out: list[int]
    rows_in: list[int]
    pairs_out: list[int]
    pairs_in: list[int]

    @staticmethod
    def of(out: np.ndarray, into: np.ndarray) -> Sizes:
        """Both [R, 2]: rows and pairs to each rank, and from each."""
        (rows_out, pairs_out), (rows_in, pairs_in) = out.T.tolist(), into.T.tolist()
        return Sizes(rows_out=rows_out, rows_in=rows_in, pairs_out=pairs_out, pairs_in=pairs_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOrder:
    """In which order one rank's tokens are sent: rank-major, tokens ascending."""

    token: torch.Tensor  # [sum(rows_out)] token of each row
    pair: torch.Tensor  # [sum(pairs_out)] flat number in [T, K] of each pair
    copies: Segments  # the rows of each token


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPairs:
    """What one rank has to compute, in the order in which it comes."""

    row: torch.Tensor  # [P] received row, ascending
    expert: torch.Tensor  # [P] expert id
    weight: torch.Tensor  # [P], without graph: that is dispatch's


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """The plan of one layer's exchange, seen from one rank."""

    sizes: Sizes  # what stays on the rank included
    order: SendOrder
    received: ReceivedPairs
    traffic: MeteredGroup = field(repr=False)
    float8: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where one rank's pairs are to go, before the ranks have agreed on it."""

    index: torch.Tensor  # [T, K] experts, -1 for no choice
    to: torch.Tensor  # int64 [T * K] ranks, R for none
    visits: torch.Tensor  # uint8 [T, R] the token goes to the rank
    sizes: torch.Tensor  # int64 [R, 2] rows and pairs for each rank

    @staticmethod
    def of(index: torch.Tensor, to: torch.Tensor, ranks: int) -> Wanted:
        """index [T, K] experts, -1 for no choice; to [T, K] the rank that serves each; T may differ between ranks."""
        to = torch.where(index >= 0, to, ranks)
        visits = torch.zeros(len(index), ranks + 1, dtype=torch.uint8, device=to.device).scatter_(1, to, 1)[:, :ranks]
        flat = to.reshape(-1)
        pairs = torch.zeros(ranks + 1, dtype=torch.int64, device=to.device).scatter_add_(0, flat, torch.ones_like(flat))
        return Wanted(index, flat, visits, torch.stack([visits.sum(0, dtype=torch.int64), pairs[:ranks]], 1))


def swap(wanted: Wanted, traffic: MeteredGroup) -> torch.Tensor:
    """int64 [2, R, 2] on the device: sizes from this rank, and to it (collective)."""
    return torch.stack([wanted.sizes, traffic.swap_sizes(wanted.sizes)])


def plan_dispatch(
    wanted: Wanted, weights: torch.Tensor, sizes: Sizes, traffic: MeteredGroup, float8: bool = False
) -> DispatchPlan:
    """The plan, once all sizes are known on the host (collective): the pairs' experts and weights travel here.

    Args:
        weights: [T, K] of the pairs.
        float8: dispatch tokens in 8 bits.
    """
    tokens, top_k = wanted.index.shape
    # Rank-major, tokens ascending: stable sorts, cut to the sizes that the host knows.
    there = order_of(1 - wanted.visits.t().reshape(-1), 1)[: sum(sizes.rows_out)]
    token = there % max(tokens, 1)
    pair = order_of(wanted.to, traffic.size)[: sum(sizes.pairs_out)]
    message = _message(wanted, weights, pair, top_k)
    received = traffic.all_to_all(message, sizes.pairs_out, sizes.pairs_in)
    code = received[:, 0]
    return DispatchPlan(
        sizes=sizes,
        order=SendOrder(token=token, pair=pair, copies=Segments.made(token, tokens)),
        received=ReceivedPairs(
            row=(code & 1).cumsum(0) - 1, expert=(code >> 1).long(), weight=_weights(received, weights.dtype)
        ),
        traffic=traffic,
        float8=float8,
    )


def alone(index: torch.Tensor, weights: torch.Tensor) -> tuple[ReceivedPairs, torch.Tensor]:
    """What a rank alone computes of index [T, K], weights [T, K]: all pairs as they lie; and their weights [T * K].

    A choice of -1 becomes one of expert 0 with weight 0: its pair cannot be left out without waiting for the device.
    """
    weight = torch.where(index >= 0, weights, 0).reshape(-1)
    expert = index.reshape(-1).clamp_min(0)
    row = torch.arange(len(expert), device=index.device) // max(index.shape[1], 1)
    return ReceivedPairs(row=row, expert=expert, weight=weight.detach()), weight


def dispatch(tokens: torch.Tensor, weights: torch.Tensor, plan: DispatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [T, H], weights [T, K] -> rows [N, H], pair weights [P] (collective, forward and backward).

    Sends each token once per destination rank forward; gradients of the copies return and are summed backward. The
    weights are those of the plan, which has sent them.
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
        ctx.plan, ctx.weights_shape = plan, weights.shape
        rows = tokens[plan.order.token]
        rows = unpack(_rows_there(pack(rows), plan), rows.dtype) if plan.float8 else _rows_there(rows, plan)
        ctx.set_materialize_grads(True)
        return rows, plan.received.weight.view_as(plan.received.weight)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor, d_pair_weights: torch.Tensor) -> Any:
        plan: DispatchPlan = ctx.plan
        plan.traffic.meter.enter("combine")
        d_tokens = _rows_back(d_rows, plan)
        back = plan.traffic.all_to_all(d_pair_weights.contiguous(), plan.sizes.pairs_in, plan.sizes.pairs_out)
        d_weights = back.new_zeros(ctx.weights_shape)
        d_weights.view(-1)[plan.order.pair] = back
        plan.traffic.meter.enter("")
        return d_tokens, d_weights, None


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


def _message(wanted: Wanted, weights: torch.Tensor, pair: torch.Tensor, top_k: int) -> torch.Tensor:
    """int32 [pairs, 2 or 3] of pairs in sending order: 2 * expert, + 1 for the first of its row; the weight's bits."""
    first = torch.ones_like(pair, dtype=torch.int32)
    token, to = pair // max(top_k, 1), wanted.to[pair]
    first[1:] = (token[1:] != token[:-1]) | (to[1:] != to[:-1])
    code = 2 * wanted.index.reshape(-1)[pair].to(torch.int32) + first
    weight = weights.detach().reshape(-1)[pair]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.cat([code[:, None], wide[:, None].view(torch.int32)], 1)


def _weights(received: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[P] of `dtype`, the inverse of `_message`."""
    wide = torch.promote_types(dtype, torch.float32)
    return columns(received, 1, received.shape[1], wide)[:, 0].to(dtype)


def _rows_there(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Rows of this rank's tokens [sum(rows_out), ...] -> those that it receives [N, ...]."""
    return plan.traffic.all_to_all(rows.contiguous(), plan.sizes.rows_out, plan.sizes.rows_in)


def _rows_back(rows: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Received rows [N, H] go home and are added up per token, by ascending rank -> [T, H]."""
    back = plan.traffic.all_to_all(rows.contiguous(), plan.sizes.rows_in, plan.sizes.rows_out)
    return add_up(back, plan.order.copies)
