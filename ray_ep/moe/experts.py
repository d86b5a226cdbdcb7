"""One MoE layer on one rank, and the function that transformers calls in place of the experts.

Weights stay in the transformers module, cut down to this rank's experts. What computes is one of four bodies, chosen
once for a way of exchanging and a kind of module. No model search here. T tokens, K top_k, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.integrations.moe import ExpertsInterface

from ray_ep.collective import Group
from ray_ep.moe.adapters import adapted
from ray_ep.moe.cpu.fused import FusedBody, is_plain
from ray_ep.moe.cpu.gemm import Packed
from ray_ep.moe.cuda import kernels_for
from ray_ep.moe.cuda.experts import FusedExperts, fits
from ray_ep.moe.exchange.around import ChunkedBody, TwoLevelBody
from ray_ep.moe.exchange.bounded import BoundedBody
from ray_ep.moe.exchange.deepep import DeepEPBody
from ray_ep.moe.exchange.grouped import GroupedBody
from ray_ep.moe.exchange.ways import DEEPEP, Exchange
from ray_ep.moe.site import Body, Shared, Site
from ray_ep.moe.slots import Slots
from ray_ep.placement import Placement

IMPLEMENTATION = "ray_ep"
"""Name under which transformers calls this package's experts function."""


class ExpertLayer:
    """One MoE layer on one rank; lives on the transformers experts module as `ray_ep_layer`.

    Args:
        index: number of the layer among the model's MoE layers.
        name: dotted name of the experts module in the model.
        num_experts: E.

    Attributes:
        calls: forward passes so far: a model that silently keeps its own experts never counts.
        pass_load: [E] of the last forward.
        slots, exchange: as they are now; `place` and `exchange_by` change them.
    """

    def __init__(self, index: int, name: str, num_experts: int, shared: Shared):
        self.index, self.name, self.num_experts, self.shared = index, name, num_experts, shared
        self.calls = 0
        self.pass_load = torch.zeros(num_experts, dtype=torch.int64)
        self.exchange = Exchange()
        self._chosen: dict[Exchange, Bodies] = {}  # a way that is taken again finds its own
        self._bodies: Bodies | None = None  # None: to be chosen in the next pass

    def place(self, placement: Placement, node_of: np.ndarray | None, device: torch.device) -> None:
        """Take on a placement's maps; moving the weights is the caller's task."""
        self.slots = Slots(placement, self.index, self.group.rank, node_of, device)
        self.pass_load = self.pass_load.to(device)
        self._chosen.clear()
        self._bodies = None
        self.forget()

    def exchange_by(self, exchange: Exchange) -> None:
        """Exchange like this from the next pass on; every rank calls it with the same."""
        self.exchange, self._bodies = exchange, self._chosen.get(exchange)

    def forget(self) -> None:
        """Weights have changed: in a pass of inference, give up what was kept of them."""
        if self.shared.passes.now.inference is not None:
            self.shared.passes.now.inference.forget(self.index)

    @property
    def body(self) -> Body | None:
        """What the last pass computed with, but for traces; None: it will be chosen in the next one."""
        return None if self._bodies is None else self._bodies.taken

    @property
    def group(self) -> Group:
        """What this layer exchanges over."""
        return self.shared.traffic.group

    @property
    def experts(self) -> list[int]:
        """Expert in each row of the weights: the owned ones first."""
        return self.slots.experts

    @property
    def owned(self) -> int:
        """The first so many rows are primaries."""
        return self.slots.owned

    @property
    def packed(self) -> tuple[Packed, Packed] | None:
        """In inference: both weights, packed for the CPU; None: they are not."""
        inference = self.shared.passes.now.inference
        return None if inference is None else inference.packed.get(self.index)

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H] (collective)."""
        self.calls += 1
        if self.shared.passes.now.idle:
            self.pass_load = torch.zeros_like(self.pass_load)
            out = self.compute(module, hidden[:0], top_k_index[:0], top_k_weights[:0])
            return torch.zeros_like(hidden) + out.sum()  # the sum of nothing: keeps the backward exchange in the graph
        tokens, counted = self.shared.passes.now.tokens, top_k_index
        if tokens is not None:  # padding goes nowhere
            counted = top_k_index.index_select(0, tokens)
            top_k_index = torch.full_like(top_k_index, -1).index_copy_(0, tokens, counted)
        self.pass_load = self.shared.counters.count(self.index, counted)
        return self.compute(module, hidden, top_k_index, top_k_weights)

    def compute(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` without counting: hidden [T, H], top_k_index [T, K] (-1: no choice), top_k_weights [T, K]."""
        now = self.shared.passes.now
        if now.capture is not None and now.capture.layer == self.index and now.capture.work is None:
            now.capture.work = (hidden.detach(), top_k_index, top_k_weights.detach())
        if now.recorder is not None:
            now.recorder.choices(self.index, top_k_index, top_k_weights)
        bodies = self._bodies
        if bodies is None or (hidden.device, hidden.dtype) != (bodies.device, bodies.dtype):
            site = Site(index=self.index, slots=self.slots, exchange=self.exchange, shared=self.shared)
            bodies = self._bodies = self._chosen[self.exchange] = Bodies(site, module, hidden)
        body = bodies.taken if now.trace is None else bodies.traced
        return body.compute(adapted(module), hidden, top_k_index, top_k_weights)


class Bodies:
    """What one layer computes with, for one kind of module and of hidden states.

    Attributes:
        taken: for the way that was taken.
        traced: for passes with a trace: flat, for only there a source knows which rank answers.
    """

    def __init__(self, site: Site, module: Any, hidden: torch.Tensor):
        self.device, self.dtype = hidden.device, hidden.dtype
        fused, kind = site.exchange.fused, site.exchange.kind
        plain = fused and is_plain(module, hidden)
        experts = FusedExperts(kernels_for(hidden.device, hidden.dtype)) if fused and fits(module, hidden) else None
        flat: Body = FusedBody(site) if plain else GroupedBody(site, experts)
        taken = flat
        if kind == "all_gather":
            taken = FusedBody(site, few=True) if plain else BoundedBody(site)
        elif kind == DEEPEP:
            taken = flat = DeepEPBody(site, experts)  # its source knows which rank answers, too
        elif kind == "two_level":
            taken = TwoLevelBody(site, flat)
        chunks = site.exchange.chunks
        self.taken, self.traced = (b if chunks == 1 else ChunkedBody(site, b, chunks) for b in (taken, flat))


def _experts_forward(module: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What transformers calls for `experts_implementation="ray_ep"`."""
    layer: ExpertLayer = module.ray_ep_layer  # type: ignore[assignment]
    return layer.forward(module, *args)


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
