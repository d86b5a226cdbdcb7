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
        layer: has group, meter, row_of [E] and held (S).

    Raises:
        BadInput: more tokens than the bound.
    """
    group: Group = layer.group
    tokens = len(hidden)
    if not bound:
        most = torch.tensor([tokens])
        group.all_reduce(most, "max")
        bound = int(most)
    if tokens > bound:
        raise BadInput(f"exchange.tokens={bound}: a rank has {tokens} tokens in one pass; allowed is up to the bound")
    pad = (0, 0, 0, bound - tokens)
    layer.meter.enter("exchange")
    everything = _Gather.apply(torch.nn.functional.pad(hidden, pad), group, layer.meter)  # [R, N, H]
    all_weights = _Gather.apply(torch.nn.functional.pad(weights, pad), group, layer.meter)  # [R, N, K]
    all_index = group.all_gather(torch.nn.functional.pad(index.to(torch.int32), pad, value=-1)).long()
    layer.meter.add([1] * group.size, all_index[:1], group.rank)
    layer.meter.enter("experts")
    column = torch.arange(bound, device=hidden.device) % routes.shape[2]
    source = torch.arange(group.size, device=hidden.device)
    serves = routes[source[:, None, None], all_index.clamp_min(0), column[None, :, None]]  # [R, N, K]
    mine = (serves == group.rank) & (all_index >= 0)
    rows = torch.where(mine, layer.row_of[all_index.clamp_min(0)], layer.held).flatten(0, 1)
    if layer.held:
        module._is_expert_parallel = True  # transformers' kernel then skips the rows of experts that are not here
        try:
            partial = grouped_mm_experts_forward(module, everything.flatten(0, 1), rows, all_weights.flatten(0, 1))
        finally:
            module._is_expert_parallel = False
    else:
        partial = 0 * everything.flatten(0, 1) + 0 * all_weights.sum()
        partial = partial + sum(p[:0].sum() for p in module.parameters(recurse=False))
    layer.meter.enter("exchange")
    out: torch.Tensor = _ScatterSum.apply(partial.view_as(everything), group, layer.meter)[:tokens]
    layer.meter.enter("")
    return out


class _Gather(torch.autograd.Function):
    """[N, ...] of every rank -> [R, N, ...]; backward sums what every rank says about this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, meter: Any) -> torch.Tensor:
        ctx.group, ctx.meter = group, meter
        return _gather(x, group, meter)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        return _scatter_sum(d, ctx.group, ctx.meter), None, None


class _ScatterSum(torch.autograd.Function):
    """[R, N, ...] on every rank -> the sum over ranks of this rank's part [N, ...]; the adjoint of _Gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, meter: Any) -> torch.Tensor:
        ctx.group, ctx.meter = group, meter
        ctx.save_for_backward(x[:0])  # see exchange._Combine: reading it starts a checkpointed block's recomputation
        return _scatter_sum(x, group, meter)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        return _gather(d.contiguous(), ctx.group, ctx.meter), None, None


def _gather(x: torch.Tensor, group: Group, meter: Any) -> torch.Tensor:
    meter.add([1] * group.size, x[None], group.rank)
    return group.all_gather(x)


def _scatter_sum(x: torch.Tensor, group: Group, meter: Any) -> torch.Tensor:
    x = x.contiguous()
    received, ones = torch.empty_like(x), [1] * group.size
    group.all_to_all(received, x, ones, ones)
    meter.add(ones, x, group.rank)
    return received.float().sum(0).to(x.dtype)
