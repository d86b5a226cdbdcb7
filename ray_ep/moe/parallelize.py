"""Put a transformers model's experts onto slots: find them, keep this rank's, and route through the group.

One adapter for every architecture whose experts go through transformers' experts interface; families/ finds
them, and brings the one that does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ray_ep.collective import EpochGroup, Group
from ray_ep.collective.device import check_current
from ray_ep.errors import BadInput, ModelError, PlacementError
from ray_ep.moe.adapters import adapted
from ray_ep.moe.balance.balancer import MODES, Balancer, Limits
from ray_ep.moe.balance.balancer import warm as warm_step
from ray_ep.moe.counters import Counters
from ray_ep.moe.cpu import kernels
from ray_ep.moe.cpu.fused import is_plain
from ray_ep.moe.cpu.gemm import Gemm, Packed
from ray_ep.moe.cpu.pool import Pool
from ray_ep.moe.exchange.elastic import ElasticPool
from ray_ep.moe.exchange.lanes import Lanes
from ray_ep.moe.exchange.meter import Meter, MeteredGroup
from ray_ep.moe.exchange.ways import Exchange
from ray_ep.moe.experts import IMPLEMENTATION, ExpertLayer
from ray_ep.moe.families.find import find_experts, find_router, is_llama4
from ray_ep.moe.families.llama4 import LOGITS, adapt
from ray_ep.moe.passes import Capture, Inference, Passes, Trace
from ray_ep.moe.recorder import Recorder
from ray_ep.moe.replicas import ReplicaExchange
from ray_ep.moe.routing import Routing
from ray_ep.moe.site import Shared
from ray_ep.placement import Placement, Topology, contiguous
from ray_ep.placement.links.groups import groups_of


class ExpertParallel:
    """What ray_ep keeps on a parallelized model, as `model.ray_ep`.

    Attributes:
        modules: the transformers experts modules in layer order; their direct parameters hold this rank's experts.
        num_experts: of a layer, on all ranks together.
        layers: the `ExpertLayer` of each.
        group: the one object that all of them keep, through all epochs.
        routing, counters, meter, exchange: shared by all layers. passes: what differs from pass to pass.
        blocks: the module around each experts module, with its router.
    """

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        num_experts: int,
        group: EpochGroup,
        sample: int,
        seed: int,
        balancer: Balancer,
    ):
        self.blocks: list[torch.nn.Module] = []  # parallelize fills it
        self.modules = list(modules.values())
        self.names = list(modules)
        self.group = group
        self.num_experts = num_experts
        self.passes = Passes()
        self.routing = Routing(len(modules), self.passes)
        self.counters = Counters(len(modules), self.num_experts, sample, seed + group.rank)
        self.meter = Meter(np.zeros(group.size, np.int64), np.zeros(len(modules), np.int64))
        self.exchange, self.balancer, self.gemm = Exchange(), balancer, Gemm()
        self.traffic = MeteredGroup(group, self.meter)
        shared = Shared(
            traffic=self.traffic,
            passes=self.passes,
            counters=self.counters,
            balancer=balancer,
            pool=Pool(),
            gemm=self.gemm,
            elastics=ElasticPool(),
            lanes=Lanes(),
        )
        self.layers = [ExpertLayer(i, name, self.num_experts, shared) for i, name in enumerate(modules)]

    def place(self, placement: Placement, node_of: np.ndarray | None, device: torch.device) -> None:
        """Take on the maps of a placement in every layer (weights are moved by the caller)."""
        self.placement, self.node_of = placement, node_of
        self.balancer.place(placement, node_of)
        self.num_nodes = 1 if node_of is None else len(set(np.asarray(node_of).tolist()))
        for layer in self.layers:
            layer.place(placement, node_of, device)
        self.replicas = [ReplicaExchange(placement, i, self.group, device) for i in range(len(self.layers))]
        self.counters.to(device)
        self.meter.to(device)

    def regroup(self, group: Group, placement: Placement, topology: Topology | None) -> None:
        """Derive again all that depends on group, size, placement or links (not collective; rows are the caller's).

        The same on every rank, those that come included: costs of the balance are measured again, nothing that was
        learnt of the old ranks is left. `ray_ep.moe.regroup` moves rows, too, and compares ranks.

        Args:
            group: that of the new epoch, or `self.group` if it was formed in place.
            placement: for its ranks.
            topology: links between them, with nodes; None: all on one node, links not measured.
        """
        before = len(self.meter.sent)
        self.group.use(group)
        self.meter.regroup(self.group.size)
        self.counters.share(before, self.group.size)
        self.balancer.regroup(None if topology is None else topology.by_groups())
        self.routing.forget()  # logits hold the graph, and with it the old group's memory
        self.place(placement, None if topology is None else groups_of(topology), self.layers[0].pass_load.device)

    def exchange_by(self, **changes: Any) -> None:
        """Let all layers exchange otherwise from the next pass on, by fields of `Exchange`; the same on every rank."""
        self.exchange = replace(self.exchange, **changes)
        for layer in self.layers:
            layer.exchange_by(self.exchange)

    def parameters(self, index: int) -> dict[str, torch.nn.Parameter]:
        """Per-expert parameters of a layer, [S, ...] with one row for each expert held."""
        return dict(self.modules[index].named_parameters(recurse=False))

    def expert_parameter_names(self) -> set[str]:
        """Names in `model.named_parameters()` of all per-expert parameters."""
        return {f"{n}.{p}".lstrip(".") for i, n in enumerate(self.names) for p in self.parameters(i)}

    def pass_load(self) -> torch.Tensor:
        """[L, E] tokens that this rank sent to each expert in the last forward."""
        return torch.stack([layer.pass_load for layer in self.layers])

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside: passes without gradients use weights packed for the CPU, which must not change meanwhile.

        Decode reads packed weights twice as fast; an expert that is used so takes its memory once more. Guests stay, as
        far as `Limits.guest_mb` goes.
        """
        inference = Inference()
        for index, module in enumerate(self.modules):
            weights = self.parameters(index)
            if adapted(module) is module and is_plain(module, weights["down_proj"]):  # which every layout has
                inference.packed[index] = (
                    Packed(weights["gate_up_proj"], self.gemm), Packed(weights["down_proj"], self.gemm),
                )  # fmt: skip
        with self.passes.changed(inference=inference):
            yield

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside: this rank's tokens are padding; it takes part in every exchange with none of them."""
        with self.passes.changed(idle=True):
            yield

    def idle_pass(self) -> None:
        """Take part in one forward of the other ranks without tokens of this rank (collective with their forward).

        Only the MoE blocks are called, on padding: no attention, no cache, no head. Without gradients.
        """
        with torch.no_grad(), self.idle():
            for block, module in zip(self.blocks, self.modules, strict=True):
                weight: torch.Tensor = next(module.parameters())
                config: Any = module.config
                block(weight.new_zeros(1, 1, config.hidden_size))

    @contextmanager
    def padded(self, tokens: torch.Tensor | None) -> Iterator[None]:
        """Inside: passes over T tokens of which those numbered `tokens` int64 [n] are there, the others padding."""
        with self.passes.changed(tokens=tokens):
            yield

    @contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Inside: passes exchange flat, and note which rank answers for each choice: see `Trace`."""
        trace: Trace = [[] for _ in self.layers]
        with self.passes.changed(trace=trace):
            yield trace

    @contextmanager
    def recording(self, recorder: Recorder, chosen: np.ndarray, tokens: int) -> Iterator[None]:
        """Inside: one forward over `tokens` of this rank; who answers for those numbered `chosen` [n] is recorded."""
        recorder.begin(chosen, tokens, self.layers[0].pass_load.device)
        with self.passes.changed(recorder=recorder):
            yield
        recorder.end(self.group)

    @contextmanager
    def capturing(self, index: int) -> Iterator[Capture]:
        """Inside: what layer `index` computes on in its first pass is kept, for `choose`."""
        capture = Capture(index)
        with self.passes.changed(capture=capture):
            yield capture


def parallelize(
    model: torch.nn.Module,
    group: Group,
    placement: Placement | None = None,
    balance: str = "auto",
    *,
    limits: Limits | None = None,
    node_of: np.ndarray | None = None,
    sample: int = 0,
    seed: int = 0,
) -> Any:
    """Run a model's experts with expert parallelism, in place.

    Every rank of the group calls it with the same model; afterwards each holds the dense part whole and the experts
    that its placement names, and forward and backward must be called by all ranks together (a rank without tokens
    inside `model.ray_ep.idle()`). A model that shall compute on a GPU is moved there before,
    and that GPU is the thread's current device, now and in each pass.
    Dense gradients are this rank's share: sum them over ranks yourself. A replica's gradient is its share too:
    `model.ray_ep.replicas` sums them to the primary.

    Args:
        model: a transformers model, or any module that contains transformers experts modules.
        placement: which expert sits where; None: contiguous.
        balance: inside each step among ranks with fast links: off, auto or always (`balancer.Balancer`).
        limits: memory and links of that balance.
        node_of: [R] node of each rank, so that tokens prefer replicas on their node; None: all on one.
        sample: size of the reservoir of token expert sets; seed: of its choice.

    Returns:
        The model, with `model.ray_ep` (an `ExpertParallel`).

    Raises:
        BadInput: an unknown `balance`, or the model is on a GPU that is not the current one.
        ModelError: no experts that go through transformers' experts interface, or already parallelized.
        PlacementError: the placement does not fit layers, experts or ranks.
    """
    modules = find_experts(model)
    if any(hasattr(m, "ray_ep_layer") for m in modules.values()):
        raise ModelError(f"{type(model).__name__} is already parallelized")
    if balance not in MODES:
        raise BadInput(f"balance={balance!r}: allowed are {', '.join(MODES)}")
    device = next(model.parameters()).device
    check_current(device)
    group = EpochGroup.of(group)
    balancer = Balancer(group, len(modules), balance, limits or Limits())
    ep = ExpertParallel(modules, same_count(modules), group, sample, seed, balancer)
    layers, experts = len(modules), ep.num_experts
    placement = contiguous(layers, experts, group.size) if placement is None else placement
    if (placement.num_layers, placement.num_ranks, placement.num_experts) != (layers, group.size, experts):
        raise PlacementError(
            f"placement is for {placement.num_layers} layers x {placement.num_experts} experts on "
            f"{placement.num_ranks} ranks; the model has {layers} MoE layers x {experts} experts and the group "
            f"{group.size} ranks"
        )
    ep.place(placement, node_of, device)
    adapt(model)
    for index, layer in enumerate(ep.layers):
        module: Any = ep.modules[index]
        keep_rows(module, layer.experts)
        module.num_experts = len(layer.experts)  # the local ones: transformers' grouped kernel counts up to it
        module.ray_ep_layer = layer
        module.config = copy.copy(module.config)  # its own: another model may share the config object
        module.config._experts_implementation = IMPLEMENTATION
    if device.type == "cpu":
        kernels.warm()
    if balance != "off":
        warm_step()
    _attach_routers(model, ep)
    ep.routing.checkpoint_blocks(model)
    ep.blocks = [model.get_submodule(name.rpartition(".")[0]) for name in ep.names]
    model.ray_ep = ep  # type: ignore[assignment]  # no module of torch's
    return model


def keep_rows(module: Any, experts: list[int]) -> None:
    """Cut an experts module's per-expert parameters [E, ...] down to the rows of `experts`, in that order.

    `module.num_experts` stays E. A module cut down before (by a partial load) must have the same experts and is kept.
    """
    if getattr(module, "ray_ep_rows", None) == experts:
        return
    for name, p in list(module.named_parameters(recurse=False)):
        if p.shape[0] != module.num_experts:
            raise ModelError(
                f"{type(module).__name__}.{name} has shape {tuple(p.shape)}: expected {module.num_experts} experts"
            )
        setattr(module, name, torch.nn.Parameter(p.data[experts].clone(), requires_grad=p.requires_grad))
    module.ray_ep_rows = list(experts)


def _attach_routers(model: torch.nn.Module, ep: ExpertParallel) -> None:
    for i, (name, module) in enumerate(zip(ep.names, ep.modules, strict=True)):
        router = find_router(model, name)
        if router is not None:
            config: Any = module.config
            top_k: Any = getattr(router, "top_k", None) or getattr(config, "num_experts_per_tok", 1)
            logits = LOGITS if is_llama4(module) else None
            ep.routing.attach(i, router, ep.num_experts, int(top_k), logits)


def same_count(modules: dict[str, torch.nn.Module]) -> int:
    """Experts of every layer; raises ModelError if that is not one number."""
    counts = {int(m.num_experts) for m in modules.values()}  # type: ignore[arg-type]
    if len(counts) > 1:
        raise ModelError(f"MoE layers have different numbers of experts: {sorted(counts)}; one number is supported")
    return counts.pop()
