"""The local experts as one autograd function: rows in, partial sums out, backward by hand; for the usual layout.

What `GroupedBody` calls between its exchanges in place of transformers' kernel. Order: order.py; products: products.py;
what lies between them: kernels.py, or reference.py. N rows, P pairs, H hidden, F ffn, S experts held, G guests:

    rows [N, H] -> x [P, H] sorted -> G = x gate_up^T [P, 2F] -> h = w silu(g) u [P, F] -> y = h down^T [P, H]
        -> sum of each row's pairs -> partial [N, H]

Saved for backward: rows and the order, not x: rows are N of P (an eighth on one rank with top-8), and gathering them
once more costs one pass over [P, H] of the fourteen that backward takes. G is saved; h is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ray_ep.moe.cuda.order import ExpertOrder, expert_order
from ray_ep.moe.cuda.products import Groups, has_grouped_kernel
from ray_ep.moe.layout import is_gated_silu
from ray_ep.moe.site import LocalPairs, LocalWeights


def fits(module: Any, hidden: torch.Tensor) -> bool:
    """Whether `FusedExperts` computes this layer: CUDA, gated SiLU in the usual layout, rows of whole 16 bytes.

    The last is what torch's grouped products ask for; transformers' kernel does, too.
    """
    return (
        hidden.is_cuda
        and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and is_gated_silu(module)
        and bool(module.gate_up_proj.dtype == hidden.dtype)
        and all(w.shape[2] * w.element_size() % 16 == 0 for w in (module.gate_up_proj, module.down_proj))
    )


class FusedExperts:
    """The experts of one rank, fused. On CUDA not run yet; its kernels ran under Triton's interpreter.

    Args:
        kernels: what `kernels_for` gives for the device.
    """

    def __init__(self, kernels: Any):
        self.kernels = kernels

    def __call__(
        self, module: Any, weights: LocalWeights, rows: torch.Tensor, pair_weights: torch.Tensor, pairs: LocalPairs
    ) -> torch.Tensor:
        """See `Experts`; for modules that `fits` takes."""
        params = [of[name] for of in (weights.own, weights.guests) if of for name in ("gate_up_proj", "down_proj")]
        total = len(pairs.row)
        order = expert_order(pairs.row, pairs.expert_row, sum(map(len, params[::2])))
        cuts = (0, total - pairs.of_guests, total) if weights.guests else (0, total)
        plan = _Plan(order=order, first=pairs.first, cuts=cuts, kernels=self.kernels)
        partial: torch.Tensor = _Experts.apply(rows, pair_weights.contiguous(), plan, *params)  # type: ignore[no-untyped-call]
        return partial


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    order: ExpertOrder
    first: torch.Tensor  # int64 [N + 1] first pair of each row
    cuts: tuple[int, ...]  # sorted pairs: of own experts, of guests
    kernels: Any

    def groups(self, params: Sequence[torch.Tensor]) -> list[Groups]:
        """One of own experts, one of guests if there are any. params: gate_up and down of each."""
        ends, found, first = self.order.ends, [], 0
        # Where torch has no grouped kernel the host waits for the device here, once a pass.
        on_host = None if has_grouped_kernel(params[0], len(ends)) else ends.tolist()
        for start, gate_up in zip(self.cuts, params[::2], strict=False):
            part = slice(first, first := first + len(gate_up))
            known = None if on_host is None else [end - start for end in on_host[part]]
            found.append(Groups(ends[part] - start if start else ends[part], known, self.kernels))
        return found

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Sorted x [P, ...] -> the part of own experts, and that of guests."""
        return [x[a:b] for a, b in zip(self.cuts, self.cuts[1:], strict=False)]


class _Experts(torch.autograd.Function):
    """rows [N, H], weights [P], plan, gate_up, down (own, then guests') -> partial [N, H]. No collective."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, plan: _Plan, *params: torch.Tensor
    ) -> torch.Tensor:
        order, kernels, groups = plan.order, plan.kernels, plan.groups(params)
        x = plan.split(rows.index_select(0, order.row))
        gs = [group.linear(part, gate_up) for group, part, gate_up in zip(groups, x, params[::2], strict=True)]
        del x
        ys = [
            group.linear(kernels.swiglu(g, weights, pair), down)
            for group, g, pair, down in zip(groups, gs, plan.split(order.pair), params[1::2], strict=True)
        ]
        ctx.plan, ctx.groups = plan, groups
        ctx.save_for_backward(rows, weights, *params, *gs)
        partial: torch.Tensor = kernels.segment_sum(ys, plan.first, order.place)
        return partial

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_partial: torch.Tensor) -> Any:
        plan: _Plan = ctx.plan
        order, kernels, parts = plan.order, plan.kernels, len(ctx.groups)
        rows, weights, *saved = ctx.saved_tensors
        params, gs = saved[: 2 * parts], saved[2 * parts :]
        needs = ctx.needs_input_grad[3:]
        d_weights, grads = torch.empty_like(weights), [None] * len(params)
        wides: list[torch.Tensor] = []  # gradients of G
        dy = d_partial.index_select(0, order.row)
        for i, (part, pair) in enumerate(zip(plan.split(dy), plan.split(order.pair), strict=True)):
            dh = ctx.groups[i].times(part, params[2 * i + 1])
            wide, h = kernels.swiglu_backward(gs[i], weights, pair, dh, d_weights)
            wides.append(wide)
            if needs[2 * i + 1]:
                grads[2 * i + 1] = ctx.groups[i].outer(part, h)
        del dy, part, dh, h
        d_rows = None
        if ctx.needs_input_grad[0]:
            dxs = [g.times(wide, gate_up) for g, wide, gate_up in zip(ctx.groups, wides, params[::2], strict=True)]
            d_rows = kernels.segment_sum(dxs, plan.first, order.place)
            del dxs
        if any(needs[::2]):
            x = plan.split(rows.index_select(0, order.row))
            for i, group in enumerate(ctx.groups):
                if needs[2 * i]:
                    grads[2 * i] = group.outer(wides[i], x[i])
        return d_rows, d_weights if ctx.needs_input_grad[1] else None, None, *grads
