"""Dispatch and combine: each token travels once per destination rank, one weighted partial sum comes back.

The autograd pair of the exchange and its plan. No experts here (experts.py), no models (parallelize.py).
T tokens of this rank, K top_k, E experts, R ranks, H hidden;
N token copies received, P (token, expert) pairs received.

    tokens [T, H] --dispatch--> rows [N, H] --experts, weights--> partial [N, H] --combine--> out [T, H]
    rows lie rank-major: all copies from rank 0, then rank 1, ... each block in token order
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe.exchange.float8 import pack, unpack

PHASES = ("route", "pack", "exchange", "experts", "combine")
"""Of a layer: agree who sends what; gather the rows; all-to-all, waiting included; experts; add up what came."""


@dataclass(slots=True)
class Meter:
    """What one rank's layers did since its making."""

    sent: np.ndarray  # [R] bytes of hidden states and metadata
    _pairs: np.ndarray  # [L]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _phase: str = ""
    _since: float = 0.0
    _there: torch.Tensor = field(init=False)  # [L] pairs that the device has counted since they were read last

    def __post_init__(self) -> None:
        self._there = torch.zeros(len(self._pairs), dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Go on counting on a device."""
        self._there = self._there.to(device)

    @property
    def pairs(self) -> np.ndarray:
        """int64 [L] (token, expert) pairs computed here, forward passes only; to read them waits for the device."""
        self._pairs += self._there.cpu().numpy()
        self._there.zero_()
        return self._pairs

    def count(self, layer: int, pairs: int | torch.Tensor) -> None:
        """Count pairs computed in a layer; a number on the device (int64, no dimensions) stays there until it is read.

        So a captured graph counts whenever it is replayed.
        """
        if isinstance(pairs, int):
            self._pairs[layer] += pairs
        else:  # atomic on a GPU: parts of a layer's tokens run on streams of their own
            self._there[layer : layer + 1].scatter_add_(0, torch.zeros_like(pairs)[None], pairs[None])

    def enter(self, phase: str) -> str:
        """From now on time counts for `phase` ("": for none); returns the phase until now."""
        now, left = time.perf_counter(), self._phase
        if left:
            self.seconds[left] += now - self._since
        self._phase, self._since = phase, now
        return left

    def add(self, sizes: list[int], row: torch.Tensor, rank: int) -> None:
        """Count `sizes` [R] rows like `row` [...]; what stays on the rank is not traffic."""
        per_row = row[:1].numel() * row.element_size() if len(row) else int(np.prod(row.shape[1:])) * row.element_size()
        for to, n in enumerate(sizes):
            if to != rank:
                self.sent[to] += n * per_row


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The plan of one layer's exchange, seen from one rank."""

    tokens: int  # T
    send_token: torch.Tensor  # [sum(rows_out)] token of each row sent, rank-major
    rows_out: list[int]  # [R] rows sent to each rank
    rows_in: list[int]  # [R] rows received from each rank; N is the sum
    pair_order: torch.Tensor  # [pairs of this rank's tokens] their flat numbers in the order they are sent
    pairs_out: list[int]  # [R]
    pairs_in: list[int]  # [R]; P is the sum
    pair_row: torch.Tensor  # [P] received row that a received pair belongs to
    pair_expert: torch.Tensor  # [P] expert id
    group: Group = field(repr=False)
    meter: Meter = field(repr=False)
    float8: bool = False


def plan(top_k_index: torch.Tensor, to: torch.Tensor, group: Group, meter: Meter, float8: bool = False) -> Dispatch:
    """Agree with all ranks on one layer's exchange (collective).

    Args:
        top_k_index: [T, K] expert ids, -1 for no choice; T may be 0 and may differ between ranks.
        to: [T, K] the rank that serves each choice.
        float8: dispatch tokens in 8 bits.
    """
    meter.enter("route")
    tokens, top_k = top_k_index.shape
    device, size = top_k_index.device, group.size
    valid = top_k_index >= 0
    to = torch.where(valid, to, size)  # R for none
    visits = torch.zeros(tokens, size + 1, dtype=torch.int64, device=device).scatter_(1, to, 1)[:, :size]
    pair_to = to.reshape(-1)
    pairs = torch.zeros(size + 1, dtype=torch.int64, device=device).scatter_add_(0, pair_to, torch.ones_like(pair_to))
    sizes_out = torch.stack([visits.sum(0), pairs[:size]], 1)  # [R, 2]
    sizes_in = torch.empty_like(sizes_out)
    ones = [1] * size
    timed(meter, lambda: group.all_to_all(sizes_in, sizes_out, ones, ones))
    group.wait()
    both = torch.cat([sizes_out, sizes_in]).tolist()  # the one time that the host waits for the device
    (rows_out, pairs_out), (rows_in, pairs_in) = zip(*both[:size], strict=True), zip(*both[size:], strict=True)

    # Rank-major, tokens ascending: stable sorts, cut to the sizes that the host knows.
    send_token = torch.argsort(1 - visits.t().reshape(-1), stable=True)[: sum(rows_out)] % max(tokens, 1)
    pair_order = torch.argsort(pair_to, stable=True)[: sum(pairs_out)]
    row_in_block = (visits.cumsum(0) - 1)[pair_order // max(top_k, 1), pair_to[pair_order]]
    meta_out = torch.stack([top_k_index.reshape(-1)[pair_order], row_in_block], 1).to(torch.int32)
    meta_in = meta_out.new_empty(sum(pairs_in), 2)
    timed(meter, lambda: group.all_to_all(meta_in, meta_out, pairs_in, pairs_out))
    meter.add(list(pairs_out), meta_out, group.rank)
    start = sizes_in[:, 0].cumsum(0) - sizes_in[:, 0]  # first row of each source
    block = torch.repeat_interleave(start, sizes_in[:, 1], output_size=sum(pairs_in))
    return Dispatch(
        tokens, send_token, list(rows_out), list(rows_in), pair_order, list(pairs_out), list(pairs_in),
        meta_in[:, 1].long() + block, meta_in[:, 0].long(), group, meter, float8,
    )  # fmt: skip


def dispatch(tokens: torch.Tensor, weights: torch.Tensor, plan: Dispatch) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [T, H], weights [T, K] -> rows [N, H], pair weights [P] (collective, forward and backward).

    Sends each token once per destination rank forward; gradients of the copies return and are summed backward.
    """
    rows, pair_weights = _Dispatch.apply(tokens, weights, plan)
    return rows, pair_weights


def combine(partial: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """partial [N, H], one weighted sum a received row -> out [T, H] (collective, forward and backward).

    Returns the partial sums and adds them forward; sends each token's gradient once per rank backward.
    """
    out: torch.Tensor = _Combine.apply(partial, plan)
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weights, plan):
        ctx.plan, ctx.weights_shape, ctx.weights_dtype = plan, weights.shape, weights.dtype
        rows = tokens[plan.send_token]
        if plan.float8:
            rows = unpack(_forth(pack(rows), plan, plan.rows_out, plan.rows_in), rows.dtype)
        else:
            rows = _forth(rows, plan, plan.rows_out, plan.rows_in)
        pair_weights = _forth(weights.reshape(-1)[plan.pair_order], plan, plan.pairs_out, plan.pairs_in)
        ctx.set_materialize_grads(True)
        return rows, pair_weights

    @staticmethod
    def backward(ctx, d_rows, d_pair_weights):
        plan = ctx.plan
        plan.meter.enter("combine")
        d_tokens = _sum_rows(_forth(d_rows, plan, plan.rows_in, plan.rows_out), plan.send_token, plan.tokens)
        back = _forth(d_pair_weights, plan, plan.pairs_in, plan.pairs_out)
        d_weights = back.new_zeros(ctx.weights_shape).view(-1)
        d_weights[plan.pair_order] = back
        plan.meter.enter("")
        return d_tokens, d_weights.view(ctx.weights_shape).to(ctx.weights_dtype), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, plan):
        ctx.plan = plan
        ctx.save_for_backward(plan.send_token)
        return _sum_rows(_forth(partial, plan, plan.rows_in, plan.rows_out), plan.send_token, plan.tokens)

    @staticmethod
    def backward(ctx, d_out):
        # In a checkpointed block reading a saved tensor starts the recomputation, which exchanges: it must come before
        # this exchange on every rank, also on one without pairs, whose experts have saved nothing.
        plan, _ = ctx.plan, ctx.saved_tensors
        plan.meter.enter("pack")
        d_partial = _forth(d_out[plan.send_token], plan, plan.rows_out, plan.rows_in)
        plan.meter.enter("experts")  # their backward runs from here to the dispatch's
        return d_partial, None


def _forth(rows: torch.Tensor, plan: Dispatch, sizes_out: list[int], sizes_in: list[int]) -> torch.Tensor:
    """One all-to-all of rows, counted by the meter."""
    rows = rows.contiguous()
    received = rows.new_empty(sum(sizes_in), *rows.shape[1:])
    timed(plan.meter, lambda: plan.group.all_to_all(received, rows, sizes_in, sizes_out))
    plan.meter.add(sizes_out, rows, plan.group.rank)
    return received


def timed(meter: Meter, exchange: Callable[[], Any]) -> Any:
    """Make an exchange; its time counts as such, and what was timed before goes on."""
    phase = meter.enter("exchange")
    received = exchange()
    meter.enter(phase)
    return received


def _sum_rows(rows: torch.Tensor, token: torch.Tensor, tokens: int) -> torch.Tensor:
    """Add rows [M, H] up per token -> [tokens, H], in float32: bfloat16 would round at every add."""
    out = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    return out.index_add_(0, token, rows.float()).to(rows.dtype)
