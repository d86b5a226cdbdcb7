"""transformers' `EPImplementation` over an `ExpertLayer`: one a MoE layer, those of a model share one `ExpertParallel`.

transformers cuts and loads the weights (DTensors, whole experts, contiguous over the ranks) and hands them to the layer
as local tensors. T tokens, K top_k, H hidden, R ranks of the expert mesh.
"""

from __future__ import annotations

import socket
import weakref
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ray_ep.collective import EpochGroup, Group, from_torch
from ray_ep.errors import BadInput, ModelError
from ray_ep.moe import ExpertParallel, Limits
from ray_ep.moe.balance.balancer import MODES, Balancer
from ray_ep.moe.balance.balancer import warm as warm_step
from ray_ep.moe.cpu import kernels
from ray_ep.moe.families.find import is_experts
from ray_ep.moe.parallelize import same_count
from ray_ep.placement import contiguous

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:
    import transformers

    raise ModelError(
        f"ray_ep.hf needs transformers 5.23, whose EPImplementationInterface it registers with: "
        f"{transformers.__version__} has none"
    ) from None

NAME = "ray_ep"
"""What `import ray_ep.hf` registers: `DistributedConfig(..., ep_implementation="ray_ep")`."""


@dataclass(frozen=True, slots=True)
class Options:
    """How the layers of a model balance: see `register`."""

    balance: str
    limits: Limits


def register(name: str = NAME, *, balance: str = "auto", limits: Limits | None = None) -> str:
    """Make ray_ep's layer known to transformers under a name, for models that are loaded from now on.

    Args:
        name: for `DistributedConfig.ep_implementation`.
        balance: inside each step: off, auto or always, as of `ray_ep.moe.parallelize`.
        limits: memory and links of that balance.

    Returns:
        The name.

    Raises:
        BadInput: an unknown `balance`.
    """
    if balance not in MODES:
        raise BadInput(f"balance={balance!r}: allowed are {', '.join(MODES)}")
    EPImplementationInterface.register(name, Maker(Options(balance, limits or Limits())))
    return name


class Maker:
    """What the registry holds: makes a layer for each experts module, as transformers walks through one model.

    Layers do not learn which model they are of; those over the same mesh object belong together, for transformers makes
    a mesh for each model.
    """

    def __init__(self, options: Options):
        self.options = options
        self._last: weakref.ref[LayersOfModel] | None = None

    def __call__(self, experts: torch.nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> Layer:
        """Called by transformers on every rank, before weights are loaded (collective at a model's first layer)."""
        check_sharded(experts, ep_mesh)
        model = None if self._last is None else self._last()
        if model is None or model.mesh is not ep_mesh:
            model = LayersOfModel(ep_mesh, self.options)
            self._last = weakref.ref(model)
        return Layer(experts, ep_mesh, tp_mesh, model)


class LayersOfModel:
    """What the layers of one model share on one rank.

    Attributes:
        mesh: [R] ranks that share the experts out among them.
        modules: transformers' experts modules, in order of the layers.
        node_of: [R] node of each rank, by host name.
    """

    def __init__(self, mesh: DeviceMesh, options: Options):
        self.mesh, self.options = mesh, options
        self.modules: list[torch.nn.Module] = []
        self.group = EpochGroup(from_torch(process_group=mesh.get_group()))
        self.node_of = nodes_of(self.group)
        self._parallel: ExpertParallel | None = None
        if mesh.device_type == "cpu":
            kernels.warm()
        if options.balance != "off":
            warm_step()

    @property
    def parallel(self) -> ExpertParallel:
        """Made at its first use, not collective: only then all layers are known and the weights are on their device."""
        if self._parallel is None:
            modules: dict[str, Any] = {str(i): m for i, m in enumerate(self.modules)}
            layers, size = len(modules), self.group.size
            experts = same_count(modules) * size
            balancer = Balancer(self.group, layers, self.options.balance, self.options.limits)
            made = ShardedParallel(modules, experts, self.group, 0, 0, balancer)
            device = next(self.modules[0].parameters()).device
            made.place(contiguous(layers, experts, size), self.node_of, device)
            self._parallel = made
        return self._parallel


class ShardedParallel(ExpertParallel):
    """An `ExpertParallel` whose weights are transformers' DTensors."""

    def parameters(self, index: int) -> dict[str, Any]:
        """Per-expert parameters of a layer as plain tensors, [S, ...] with one row for each expert held."""
        return {name: p.to_local() for name, p in shards_of(self.modules[index]).items()}


class Layer(EPImplementation):
    """One MoE layer of one rank, called by transformers in place of the experts.

    Ranks that hold the same batch (tensor parallelism) take a slice of its tokens each.
    """

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, model: LayersOfModel):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.model, self.index = experts, model, len(model.modules)
        model.modules.append(experts)
        experts.ray_ep_layers = model
        experts._is_expert_parallel = False  # no choice of experts elsewhere reaches the kernel: nothing to mask

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H] (collective, forward and backward).

        The module's parameters are this rank's rows, as plain tensors, while transformers calls this.
        """
        tokens, layer = hidden_states.shape[0], self.model.parallel.layers[self.index]
        if self.tp_mesh.size() > 1:
            hidden_states, top_k_index, top_k_weights = (
                _slice(t, self.tp_mesh) for t in (hidden_states, top_k_index, top_k_weights)
            )
        out = layer.forward(self.experts, hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() == 1:
            return out
        shape, stride = torch.Size((tokens, out.shape[1])), (out.shape[1], 1)
        rows = DTensor.from_local(out.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=stride)
        whole: torch.Tensor = rows.full_tensor()
        return whole


def check_sharded(experts: Any, mesh: DeviceMesh) -> None:
    """Raise ModelError unless transformers has cut this module's weights into whole experts, contiguous on the mesh."""
    kind = type(experts).__name__
    if not is_experts(experts):
        raise ModelError(f"{kind} does not go through transformers' experts interface: ray_ep cannot run it")
    for name, p in shards_of(experts).items():
        if not isinstance(p, DTensor) or p.device_mesh != mesh or tuple(p.placements) != (Shard(0),):
            raise ModelError(
                f"{kind}.{name} is not shared out by experts: its rule in ep_plan must be 'grouped_gemm', as in the "
                "model's own plan"
            )
        if p.shape[0] != experts.num_experts * mesh.size():
            raise ModelError(
                f"{kind}.{name} has {p.shape[0]} experts: expected {experts.num_experts} on each of {mesh.size()} ranks"
            )


def shards_of(experts: torch.nn.Module) -> dict[str, Any]:
    """Per-expert parameters of an experts module by name, as transformers keeps them: DTensors."""
    return dict(experts.named_parameters(recurse=False))


def nodes_of(group: Group) -> np.ndarray:
    """[R] node of each rank, by host name, numbered by first appearance (collective)."""
    mine = torch.tensor(zlib.crc32(socket.gethostname().encode()), dtype=torch.int64)
    names = group.all_gather(mine).tolist()
    return np.array([names.index(name) for name in names])


def _slice(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's rows of a tensor that all ranks of the mesh hold; backward gathers the rows' gradients."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    rows: torch.Tensor = whole.redistribute(mesh, [Shard(0)]).to_local()
    return rows
