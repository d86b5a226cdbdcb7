"""What goes around a body: a level of nodes before it, or tokens in parts.

Both are bodies themselves. T tokens, K top_k, H hidden, N rows received.
"""

from __future__ import annotations

from typing import Any

import torch

from ray_ep.moe.exchange.dispatch import combine, dispatch, plan_dispatch
from ray_ep.moe.exchange.ways import by_row
from ray_ep.moe.site import Body, Site


class TwoLevelBody:
    """Tokens travel once to each node, to the rank that stands there for this one, whose body is the second level.

    Args:
        site: of the layer. inner: among the ranks of a node, as if the tokens were the gateway's own.
    """

    def __init__(self, site: Site, inner: Body):
        self.site, self.inner = site, inner

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        site, meter = self.site, self.site.traffic.meter
        meter.enter("route")
        to = site.slots.served_by(index, site.slots.gateways)
        plan = plan_dispatch(index, to, site.traffic, site.exchange.float8)
        meter.enter("pack")
        rows, pair_weights = dispatch(hidden, weights, plan)
        partial = self.inner.compute(module, rows, *by_row(plan.received, pair_weights, len(rows), index.shape[1]))
        meter.enter("combine")
        out = combine(partial, plan)
        meter.enter("")
        return out


class ChunkedBody:
    """Tokens in parts, one after the other; on GPUs a stream each: one part computes while the next is on its way.

    Not run on a GPU yet. Args: inner: of each part. chunks: how many.
    """

    def __init__(self, inner: Body, chunks: int):
        self.inner, self.chunks = inner, chunks

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        parts = list(zip(*(x.tensor_split(self.chunks) for x in (hidden, index, weights)), strict=True))
        if hidden.device.type != "cuda":
            return torch.cat([self.inner.compute(module, *part) for part in parts])
        main, streams, out = torch.cuda.current_stream(), [], []
        for part in parts:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                out.append(self.inner.compute(module, *part))
            for tensor in (*part, out[-1]):
                tensor.record_stream(stream)
            out[-1].record_stream(main)
            streams.append(stream)
        for stream in streams:  # every part is read below, and none need end before the next
            main.wait_stream(stream)
        return torch.cat(out)
