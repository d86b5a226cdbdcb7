"""The all-gather way on any device: every rank gets every token, computes its share, and sums are scattered back.

For few tokens. All shapes are known beforehand, so nothing waits for the device and decode can be captured in a CUDA
graph. R ranks, N tokens of a rank at most (padded), T of this rank, K top_k, H hidden, E experts, S experts held.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ray_ep.collective import Group
from ray_ep.errors import BadInput
from ray_ep.moe.exchange.dispatch import Meter, timed


def bounded(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    bound: int,
    routes: torch.Tensor,
    layer: Any,
) -> torch.Tensor:
    """hidden [T, H], index [T, K] (-1: no choice), weights [T, K] -> [T, H] (collective, forward and backward).

    Args:
        bound: N, the same on every rank; 0: agree on it now, which waits for the device.
        routes: [R, E, C] the rank that serves an expert for tokens of each source; token t takes column t % C.
        layer: has group, meter, count_pairs, row_of [E] and held (S).

    Raises:
        BadInput: more tokens than the bound.
    """
    group: Group = layer.group
    meter: Meter = layer.meter
    tokens = len(hidden)
    if not bound:
        most = torch.tensor([tokens])
        timed(meter, lambda: group.all_reduce(most, "max"))
        bound = int(most)
    if tokens > bound:
        raise BadInput(f"exchange.tokens={bound}: a rank has {tokens} tokens in one pass; allowed is up to the bound")
    pad = (0, 0, 0, bound - tokens)
    meter.enter("pack")
    padded, padded_weights = (torch.nn.functional.pad(x, pad) for x in (hidden, weights))
    everything, all_weights = _Gather.apply(padded, padded_weights, group, meter)  # [R, N, H], [R, N, K]
    all_index = _gather(torch.nn.functional.pad(index.to(torch.int32), pad, value=-1), group, meter).long()
    meter.enter("route")
    column = torch.arange(bound, device=hidden.device) % routes.shape[2]
    source = torch.arange(group.size, device=hidden.device)
    serves = routes[source[:, None, None], all_index.clamp_min(0), column[None, :, None]]  # [R, N, K]
    mine = (serves == group.rank) & (all_index >= 0)
    rows = torch.where(mine, layer.row_of[all_index.clamp_min(0)], layer.held).flatten(0, 1)
    layer.count_pairs(mine.sum())
    meter.enter("experts")
    if layer.held and bound:
        module._is_expert_parallel = True  # transformers' kernel then skips the rows of experts that are not here
        try:
            partial = grouped_mm_experts_forward(module, everything.flatten(0, 1), rows, all_weights.flatten(0, 1))
        finally:
            module._is_expert_parallel = False
    else:
        partial = 0 * everything.flatten(0, 1) + 0 * all_weights.sum()
        partial = partial + sum(p[:0].sum() for p in module.parameters(recurse=False))
    meter.enter("combine")
    out: torch.Tensor = _ScatterSum.apply(partial.view_as(everything), group, meter)[:tokens]
    meter.enter("")
    return out


class _Gather(torch.autograd.Function):
    """Tokens [N, H] and weights [N, K] of every rank -> [R, N, ...]; backward sums what all say about this rank's."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, group: Group, meter: Meter) -> Any:
        ctx.group, ctx.meter = group, meter
        return _gather(hidden, group, meter), _gather(weights, group, meter)

    @staticmethod
    def backward(ctx: Any, d_hidden: torch.Tensor, d_weights: torch.Tensor) -> Any:
        ctx.meter.enter("combine")
        d_weights = _scatter_sum(d_weights, ctx.group, ctx.meter)
        d_hidden = _scatter_sum(d_hidden, ctx.group, ctx.meter)
        ctx.meter.enter("")
        return d_hidden, d_weights, None, None


class _ScatterSum(torch.autograd.Function):
    """[R, N, ...] on every rank -> the sum over ranks of this rank's part [N, ...]; the adjoint of _Gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, meter: Meter) -> torch.Tensor:
        ctx.group, ctx.meter = group, meter
        ctx.save_for_backward(x[:0])  # see exchange._Combine: reading it starts a checkpointed block's recomputation
        return _scatter_sum(x, group, meter)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        ctx.meter.enter("pack")
        d_partial = _gather(d.contiguous(), ctx.group, ctx.meter)
        ctx.meter.enter("experts")  # their backward runs from here to the gather's
        return d_partial, None, None


def _gather(x: torch.Tensor, group: Group, meter: Meter) -> torch.Tensor:
    meter.add([1] * group.size, x[None], group.rank)
    return timed(meter, lambda: group.all_gather(x))


def _scatter_sum(x: torch.Tensor, group: Group, meter: Meter) -> torch.Tensor:
    x = x.contiguous()
    received, ones = torch.empty_like(x), [1] * group.size
    timed(meter, lambda: group.all_to_all(received, x, ones, ones))
    meter.add(ones, x, group.rank)
    return received.float().sum(0).to(x.dtype)
