"""What goes around a body: a level of nodes before it, or tokens in parts.

Both are bodies themselves. T tokens, K top_k, H hidden, N rows received.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.moe.exchange.dispatch import Sizes, Wanted, combine, dispatch, plan_dispatch, swap
from ray_ep.moe.exchange.steps import Part, SteppedBody, Steps, WithParameters, steps_of, together
from ray_ep.moe.exchange.ways import by_row
from ray_ep.moe.site import Body, Site


class TwoLevelBody(SteppedBody):
    """Tokens travel once to each node, to the rank that stands there for this one, whose body is the second level.

    Args:
        site: of the layer. inner: among the ranks of a node, as if the tokens were the gateway's own.
    """

    def __init__(self, site: Site, inner: Body):
        super().__init__(site)
        self.inner = inner

    def steps(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Steps:
        """See `SteppedBody.steps`."""
        site, traffic, meter = self.site, self.site.traffic, self.site.traffic.meter
        meter.enter("route")
        to, recorder = site.slots.served_by(index, site.slots.gateways), site.shared.passes.now.recorder
        sent = index if recorder is None else recorder.passes_on(index, to)
        wanted = Wanted.of(sent, to, traffic.size)
        asked = swap(wanted, traffic)
        meter.enter("")
        answer = yield asked
        meter.enter("route")
        plan = plan_dispatch(wanted, weights, Sizes.of(*answer), traffic, site.exchange.float8)
        meter.enter("pack")
        rows, pair_weights = dispatch(hidden, weights, plan)
        second, its_weights = by_row(plan.received, pair_weights, len(rows), index.shape[1])
        if recorder is not None:
            second = recorder.arrived(index, second, plan.sizes.rows_in)
        meter.enter("")
        partial = yield from steps_of(self.inner, module, rows, second, its_weights)
        meter.enter("combine")
        out = combine(partial, plan)
        meter.enter("")
        return out


class ChunkedBody:
    """Tokens in parts; on GPUs a stream each: one part travels while another computes. Not run on a GPU yet.

    Args:
        site: of the layer. inner: of each part. chunks: how many.
    """

    def __init__(self, site: Site, inner: Body, chunks: int):
        self.site, self.inner, self.chunks = site, inner, chunks

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        inputs = list(zip(*(x.tensor_split(self.chunks) for x in (hidden, index, weights)), strict=True))
        if (recorder := self.site.shared.passes.now.recorder) is not None:
            recorder.parts(index, [part for _, part, _ in inputs])
        streams = self.site.shared.lanes.of(self.chunks, hidden.device)
        if streams[0] is not None:
            module = WithParameters.of_streams(module)
        parts = [
            Part(steps_of(self.inner, module, *some), stream) for some, stream in zip(inputs, streams, strict=True)
        ]
        out = together(parts, self.site.traffic.group)
        for stream, some, there in zip(streams, inputs, out, strict=True):
            if stream is not None:
                for tensor in some:  # backward reads them on this stream, too
                    tensor.record_stream(stream)
                there.record_stream(torch.cuda.current_stream())
        whole: torch.Tensor = _Whole.apply(*out)  # type: ignore[no-untyped-call]
        return whole


class _Whole(torch.autograd.Function):
    """Parts [t, H] -> all tokens [T, H], and the gradient to its parts.

    Its backward reads a saved tensor, which starts the recomputation of a checkpointed block: here, on the stream of
    the block's forward. Started by a part's backward all of the block would run on the part's stream, from its memory,
    and what belongs to no part would be read elsewhere without waiting for that.
    """

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.sizes = list(map(len, parts))
        ctx.save_for_backward(parts[0].new_empty(0))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, d_whole: torch.Tensor) -> Any:
        _ = ctx.saved_tensors
        return d_whole.split(ctx.sizes)  # type: ignore[no-untyped-call]
