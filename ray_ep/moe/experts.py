"""The slots of one MoE layer on one rank, and the function that transformers calls in place of the experts.

Weights stay in the transformers module, cut down to this rank's experts, so every layout that transformers knows
(gated or not, biased, transposed, interleaved, post-norm) works through its own grouped kernel. No model search here.
E experts, S experts held by this rank (each once: slots that repeat an expert stay empty), P pairs, N rows, H hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate, grouped_mm_experts_forward

from ray_ep.collective import Group
from ray_ep.moe.balance.balancer import Balancer
from ray_ep.moe.balance.guests import Borrow, Guests, Kept, destinations
from ray_ep.moe.counters import Counters
from ray_ep.moe.cpu.fused import FusedExperts
from ray_ep.moe.cpu.fused_plan import Agreed, agree, gather
from ray_ep.moe.cpu.gemm import Packed
from ray_ep.moe.cpu.pool import Pool
from ray_ep.moe.exchange.bounded import bounded
from ray_ep.moe.exchange.dispatch import Meter, combine, dispatch, plan
from ray_ep.moe.exchange.ways import Exchange, by_row, gateways
from ray_ep.moe.routing import Routing, recomputing
from ray_ep.placement import Placement
from ray_ep.placement.in_step.rules import StepPlan, StepRules

IMPLEMENTATION = "ray_ep"


@dataclass(frozen=True, slots=True)
class Shared:
    """What all layers of a model share on one rank."""

    group: Group
    routing: Routing
    meter: Meter
    counters: Counters
    pool: Pool
    exchange: Exchange
    balancer: Balancer


class ExpertLayer:
    """State of one MoE layer on one rank; lives on the transformers experts module as `ray_ep_layer`.

    Args:
        index: number of the layer among the model's MoE layers.
        name: dotted name of the experts module in the model.
        num_experts: E.
    """

    def __init__(
        self,
        index: int,
        name: str,
        num_experts: int,
        shared: Shared,
    ):
        self.index, self.name, self.num_experts = index, name, num_experts
        self.group, self.routing, self.meter = shared.group, shared.routing, shared.meter
        self.counters, self.pool = shared.counters, shared.pool
        self.exchange, self.balancer = shared.exchange, shared.balancer
        self.fused = True  # use the fused body where it fits; off for comparison
        self.room = 0  # tokens of a rank that an all-gather has room for so far, equal on all ranks
        self.packed: tuple[Packed, Packed] | None = None  # in inference
        self.kept: Kept | None = None  # guests of earlier steps, in inference
        self.calls = 0  # forward passes so far: a model that silently keeps its own experts never counts
        self.capture = False  # keep what the next pass computes on, in `captured`
        self.captured: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.trace: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # (experts, ranks) [T, K] while tracing
        self.experts: list[int] = []  # expert in each row of the weights: the owned ones first
        self.pass_load = torch.zeros(num_experts, dtype=torch.int64)  # [E] of the last forward
        self.owned = 0  # the first `owned` rows are primaries

    def place(self, placement: Placement, node_of: np.ndarray | None, device: torch.device) -> None:
        """Take on a placement's maps; moving the weights is the caller's task."""
        self.experts = placement.experts_of(self.index, self.group.rank)
        self.owned = sum(placement.owner[self.index, e] == self.group.rank for e in self.experts)
        self.routes = torch.from_numpy(placement.routes(self.index, self.group.rank, node_of)).to(device)  # [E, C]
        self.routes32 = self.routes.cpu().numpy().astype(np.int32)
        self.held = len(self.experts)
        self.pass_load = self.pass_load.to(device)
        row_of = torch.full((self.num_experts,), -1)
        row_of[self.experts] = torch.arange(len(self.experts))
        self.kept = None
        self.row_of = row_of.to(device)  # [E] row of the local weights, -1 if not here
        self.row_of32 = row_of.numpy()
        self._routes_of = functools.cache(lambda source: placement.routes(self.index, source, node_of).astype(np.int32))
        nodes = np.zeros(self.group.size, np.int64) if node_of is None else np.asarray(node_of)
        self.gateways = torch.from_numpy(gateways(self.routes.cpu().numpy(), nodes, self.group.rank)).to(device)
        self._all_routes: torch.Tensor | None = None

    def routes_of(self, source: int) -> np.ndarray:
        """[E, C] int32: the rank that serves an expert for tokens of `source`."""
        routes: np.ndarray = self._routes_of(source)
        return routes

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H] (collective)."""
        self.calls += 1
        if self.routing.idle:
            self.pass_load = torch.zeros_like(self.pass_load)
            out = self.compute(module, hidden[:0], top_k_index[:0], top_k_weights[:0])
            return torch.zeros_like(hidden) + out.sum()  # the sum of nothing: keeps the backward exchange in the graph
        self.pass_load = self.counters.count(self.index, top_k_index)
        return self.compute(module, hidden, top_k_index, top_k_weights)

    def compute(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` without counting: hidden [T, H], top_k_index [T, K] (-1: no choice), top_k_weights [T, K]."""
        if self.capture:
            self.captured, self.capture = (hidden.detach(), top_k_index, top_k_weights.detach()), False
        chunks = self.exchange.chunks
        if chunks == 1:
            return self._travel(module, hidden, top_k_index, top_k_weights)
        parts = zip(*(x.tensor_split(chunks) for x in (hidden, top_k_index, top_k_weights)), strict=True)
        if hidden.device.type != "cuda":
            return torch.cat([self._travel(module, *part) for part in parts])
        main, out = torch.cuda.current_stream(), []
        for part in parts:  # a stream each: one part's experts run while the next is on its way (not run on a GPU yet)
            stream = torch.cuda.Stream()
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                out.append(self._travel(module, *part))
            for tensor in (*part, out[-1]):
                tensor.record_stream(stream)
            out[-1].record_stream(main)
            main.wait_stream(stream) if len(out) == chunks else None
        return torch.cat(out)

    def _travel(
        self, module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        way = self.exchange
        kind = "flat" if self.trace is not None else way.kind  # only there a source knows which rank answers
        if kind == "two_level":
            self.meter.enter("route")
            column = torch.arange(len(hidden), device=hidden.device) % self.routes.shape[1]
            to = self.gateways[top_k_index.clamp_min(0), column[:, None]]
            first = plan(top_k_index, to, self.group, self.meter, way.float8)
            self.meter.enter("pack")
            rows, pair_weights = dispatch(hidden, top_k_weights, first)
            index, weights = by_row(first, pair_weights, len(rows), top_k_index.shape[1])
            partial = self._flat(module, rows, index, weights, kind)
            self.meter.enter("combine")
            out = combine(partial, first)
            self.meter.enter("")
            return out
        if kind == "all_gather" and not (self.fused and is_plain(module, hidden)):
            return bounded(module, hidden, top_k_index, top_k_weights, way.tokens, self.all_routes(), self)
        return self._flat(module, hidden, top_k_index, top_k_weights, kind)

    def note(self, top_k_index: torch.Tensor, to: torch.Tensor) -> None:
        """While tracing: keep which rank answers for each choice, both [T, K]."""
        if self.trace is not None:
            self.trace.append((top_k_index, to.long()))

    def _flat(
        self, module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, kind: str
    ) -> torch.Tensor:
        fused = self.fused and is_plain(module, hidden)
        if fused and kind == "all_gather":
            return self._fuse(module, hidden, top_k_weights, gather(hidden, top_k_index, top_k_weights, self))
        params = list(module.parameters(recurse=False))
        rules = self.balancer.rules(self.index, params, hidden, torch.is_grad_enabled())
        step, guests, kept = None, None, None
        if rules is not None:
            kept = self._keep(rules) if fused else None
            rules = rules if kept is None else kept.rules
            self.meter.enter("route")
            counts = torch.bincount(top_k_index[top_k_index >= 0].reshape(-1), minlength=self.num_experts)
            step = self.balancer.plan(counts.to(torch.int32), rules, self.meter, not recomputing())
            row_of = self.row_of32 if kept is None else kept.row_of
            guests = Guests.of(step, row_of, self.group, self.meter, self.balancer.keep)
        if fused:
            ours = agree(hidden, top_k_index, top_k_weights, self, step, guests, kept)
            out = self._fuse(module, hidden, top_k_weights, ours)
            if step is not None and kept is not None:
                self._settle(kept, step, ours)
            return out
        self.meter.enter("route")
        column = torch.arange(len(hidden), device=hidden.device) % self.routes.shape[1]
        to = self.routes[top_k_index.clamp_min(0), column[:, None]]
        if step is not None:
            to = destinations(top_k_index, torch.from_numpy(step.sends(self.group.rank)).to(to), self.group.rank)
        self.note(top_k_index, to)
        agreed = plan(top_k_index, to, self.group, self.meter, self.exchange.float8)
        self.count_pairs(len(agreed.pair_row))
        self.meter.enter("pack")
        rows, weights = dispatch(hidden, top_k_weights, agreed)
        view, row = module, self.row_of
        if guests is not None:
            rows, *more = Borrow.apply(guests, rows, *params)
            names = [name for name, _ in module.named_parameters(recurse=False)]
            view = Extended(module, dict(zip(names, more, strict=True)), self.held + len(guests.experts))
            row = row.clone()
            row[guests.experts] = self.held + torch.arange(len(guests.experts), device=row.device)
        self.meter.enter("experts")
        partial = self._compute(view, rows, weights, agreed.pair_row, row[agreed.pair_expert])
        self.meter.enter("combine")
        out = combine(partial, agreed)
        self.meter.enter("")
        return out

    def _keep(self, rules: StepRules) -> Kept | None:
        """Where guests stay; None if weights may change, or there is no room for one in every layer."""
        slots = self.balancer.slots_to_keep()
        if self.packed is None or torch.is_grad_enabled() or not slots:
            return None
        if self.kept is None:
            self.kept = Kept(rules, slots, self.row_of32, self.held)
        return self.kept

    def _settle(self, kept: Kept, step: StepPlan, ours: Agreed) -> None:
        """Guests of this step stay, packed like the rank's own experts."""
        stay = kept.settle(step, ours.guests, ours.arrived)
        for packed, new in zip(self.packed or (), ours.arrived, strict=False):
            for row in new:
                packed.append(row)
        if not stay:
            for packed in self.packed or ():
                packed.cut(self.held)

    def _fuse(self, module: Any, hidden: torch.Tensor, weights: torch.Tensor, ours: Agreed) -> torch.Tensor:
        self.count_pairs(len(ours.place))
        grad = torch.is_grad_enabled()
        packed = None if grad else self.packed
        return FusedExperts.apply(hidden, weights, module.gate_up_proj, module.down_proj, ours, packed, grad)

    def all_routes(self) -> torch.Tensor:
        """[R, E, C] the rank that serves an expert for tokens of each source."""
        if self._all_routes is None:
            every = np.stack([self.routes_of(source) for source in range(self.group.size)])
            self._all_routes = torch.from_numpy(every).to(self.row_of.device).long()
        return self._all_routes

    def count_pairs(self, pairs: int | torch.Tensor) -> None:
        """Count pairs that this rank computes in this pass (see Meter.count), unless it is a recomputation."""
        if not recomputing():
            self.meter.count(self.index, pairs)

    def _compute(
        self, module: Any, rows: torch.Tensor, weights: torch.Tensor, pair_row: torch.Tensor, expert_row: torch.Tensor
    ) -> torch.Tensor:
        """Run each received pair through its expert and sum per received row: [N, H] -> [N, H]."""
        if not len(pair_row):
            # No pairs, so no rows: but a graph, through the weights too, so that backward exchanges here as well.
            params = module.more.values() if isinstance(module, Extended) else module.parameters(recurse=False)
            return rows + weights.sum() + sum(p[:0].sum() for p in params)
        out = grouped_mm_experts_forward(module, rows[pair_row], expert_row[:, None], weights[:, None])  # [P, H]
        partial = torch.zeros(len(rows), out.shape[1], dtype=torch.float32, device=out.device)
        return partial.index_add(0, pair_row, out.float()).to(rows.dtype)


class Extended:
    """An experts module with other per-expert parameters, for the length of one call of transformers' kernel."""

    def __init__(self, module: torch.nn.Module, more: dict[str, torch.Tensor], num_experts: int):
        self.module, self.more, self.num_experts = module, more, num_experts

    def __getattr__(self, name: str) -> Any:
        return self.more[name] if name in self.more else getattr(self.module, name)


def is_plain(module: Any, hidden: torch.Tensor) -> bool:
    """Whether the fused body computes this layer: CPU, gated SiLU in the usual layout, float32 or bfloat16."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and module.has_gate
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and module.is_concatenated
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation))
        and module.gate_up_proj.dtype == hidden.dtype
    )


def _experts_forward(module: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What transformers calls for `experts_implementation="ray_ep"`."""
    layer: ExpertLayer = module.ray_ep_layer  # type: ignore[assignment]
    return layer.forward(module, *args)


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
