"""The bounded body: every rank gets every token, computes its share, and sums are scattered back; on any device.

For few tokens. All shapes are known beforehand, so nothing waits for the device and decode can be captured in a CUDA
graph. R ranks, N tokens of a rank at most (padded), T of this rank, K top_k, H hidden, E experts, S experts held.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from ray_ep.errors import BadInput
from ray_ep.moe.exchange.columns import beside, columns, width
from ray_ep.moe.exchange.meter import MeteredGroup
from ray_ep.moe.site import Site


class BoundedBody:
    """The body of the all-gather way, but for layers that the fused one computes. Not run on a GPU yet.

    Args:
        site: of the layer; `exchange.tokens` is N, or 0: it is agreed on in each pass, which waits for the device.
    """

    def __init__(self, site: Site):
        self.site = site
        self.routes = site.slots.all_routes()

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`.

        Raises:
            BadInput: more tokens than the bound.
        """
        slots, traffic, tokens = self.site.slots, self.site.traffic, len(hidden)
        bound = self.site.exchange.tokens or traffic.largest(tokens)
        if tokens > bound:
            raise BadInput(
                f"exchange.tokens={bound}: a rank has {tokens} tokens in one pass; allowed is up to the bound"
            )
        traffic.meter.enter("pack")
        everything, all_weights, all_index = self._gather(hidden, index, weights, bound)
        traffic.meter.enter("route")
        if self.site.listened:
            self.site.note(index, slots.served_by(index, slots.routes))
        rows, mine = self._rows(all_index)
        self.site.count_pairs(mine.sum())
        traffic.meter.enter("experts")
        flat, flat_weights = everything.flatten(0, 1), all_weights.flatten(0, 1)  # [R * N, H], [R * N, K]
        if slots.held and bound:
            module._is_expert_parallel = True  # transformers' kernel then skips the rows of experts that are not here
            try:
                partial = grouped_mm_experts_forward(module, flat, rows, flat_weights)
            finally:
                module._is_expert_parallel = False
        else:
            partial = 0 * flat + 0 * all_weights.sum()
            partial = partial + sum(p[:0].sum() for p in module.parameters(recurse=False))
        traffic.meter.enter("combine")
        out: torch.Tensor = _ScatterSum.apply(partial.view_as(everything), traffic)  # type: ignore[no-untyped-call]
        traffic.meter.enter("")
        return out[:tokens]

    def _gather(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, bound: int
    ) -> tuple[torch.Tensor, ...]:
        """Everybody's hidden [R, N, H], weights [R, N, K] and experts [R, N, K], -1 for none (collective)."""
        pad = (0, 0, 0, bound - len(hidden))
        padded, padded_weights = (torch.nn.functional.pad(x, pad) for x in (hidden, weights))
        padded_index = torch.nn.functional.pad(index.to(torch.int32), pad, value=-1)
        found: tuple[torch.Tensor, ...] = _Gather.apply(padded, padded_weights, padded_index, self.site.traffic)  # type: ignore[no-untyped-call]
        return found

    def _rows(self, all_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """all_index [R, N, K] -> local rows [R * N, K], S where it is not this rank's, and whether it is [R, N, K]."""
        slots, traffic = self.site.slots, self.site.traffic
        routes, device = self.routes, all_index.device
        column = torch.arange(all_index.shape[1], device=device) % routes.shape[2]
        source = torch.arange(traffic.size, device=device)
        expert = all_index.clamp(0, routes.shape[1] - 1)  # after an aborted exchange it may be any: see plan_dispatch
        serves = routes[source[:, None, None], expert, column[None, :, None]]
        mine = (serves == traffic.rank) & (all_index >= 0)
        return torch.where(mine, slots.row_of[expert], slots.held).flatten(0, 1), mine


class _Gather(torch.autograd.Function):
    """Tokens [N, H], weights [N, K] and experts int32 [N, K] of every rank, in one message -> [R, N, ...] each.

    Backward sums what all ranks say about this one's tokens and weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, traffic: MeteredGroup
    ) -> Any:
        ctx.traffic = traffic
        kinds = (hidden, weights, index)
        every = traffic.all_gather(beside(kinds))  # uint8 [R, N, bytes of a token]
        ends = list(accumulate(map(width, kinds)))
        found = [columns(every, a, b, x.dtype) for (a, b), x in zip(pairwise([0, *ends]), kinds, strict=True)]
        found[2] = found[2].long()
        ctx.mark_non_differentiable(found[2])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, d_hidden: torch.Tensor, d_weights: torch.Tensor, _: Any) -> Any:
        ctx.traffic.meter.enter("combine")
        d_weights = _scatter_sum(d_weights, ctx.traffic)
        d_hidden = _scatter_sum(d_hidden, ctx.traffic)
        ctx.traffic.meter.enter("")
        return d_hidden, d_weights, None, None


class _ScatterSum(torch.autograd.Function):
    """[R, N, ...] on every rank -> the sum over ranks of this rank's part [N, ...]; the adjoint of _Gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, traffic: MeteredGroup) -> torch.Tensor:
        ctx.traffic = traffic
        # See dispatch._Combine: reading it starts a checkpointed block's recomputation. No view: that would keep x.
        ctx.save_for_backward(x.new_empty(0))
        return _scatter_sum(x, traffic)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        ctx.traffic.meter.enter("pack")
        d_partial = ctx.traffic.all_gather(d.contiguous())
        ctx.traffic.meter.enter("experts")  # their backward runs from here to the gather's
        return d_partial, None


def _scatter_sum(x: torch.Tensor, traffic: MeteredGroup) -> torch.Tensor:
    ones = [1] * traffic.size
    received = traffic.all_to_all(x.contiguous(), ones, ones)
    return received.float().sum(0).to(x.dtype)
