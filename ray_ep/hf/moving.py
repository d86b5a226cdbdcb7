"""Experts of a model that transformers has loaded move to other ranks; what is saved stays in the experts' order.

transformers can express one thing: E / R whole experts on each of R ranks, each once. Which ones is ours: rows move
between ranks, with the optimizer's moments, and a state dict moves them back. S = E / R rows of a rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ray_ep.collective import Group
from ray_ep.errors import BadInput, ModelError, PlacementError
from ray_ep.hf.layers import LayersOfModel, shards_of
from ray_ep.moe import ExpertParallel
from ray_ep.moe.migrate import agree
from ray_ep.placement import Placement, contiguous


def experts_of(model: torch.nn.Module) -> ExpertParallel:
    """What ray_ep keeps of a model that transformers loaded with it: loads, balance, group, placement (not collective).

    Raises:
        ModelError: it was not loaded with `ep_implementation="ray_ep"`.
    """
    return _layers_of(model).parallel


@torch.no_grad()
def apply_placement(model: torch.nn.Module, placement: Placement | None, optimizer: Any = None) -> None:
    """Move experts to the ranks that a placement names (collective over all ranks, between steps).

    From then on `model.state_dict()`, and with it `save_pretrained`, is collective, too: it moves rows back into the
    experts' order. After a GroupError the weights are of no use: load them again.

    Args:
        placement: each expert once, the same number on every rank of the expert mesh; None: as transformers loads them.
        optimizer: torch's, whose state travels with the rows: all that is shaped like its parameter.

    Raises:
        ModelError: the model was not loaded with ray_ep, gradients are present, or several ranks share out an expert.
        PlacementError: the placement does not fit the model, transformers cannot express it, the ranks were given
            different ones, or another rank refuses. Nothing has moved after any of these.
    """
    layers = _layers_of(model)
    ep = layers.parallel
    then = contiguous(len(ep.layers), ep.num_experts, ep.group.size) if placement is None else placement
    ours = zlib.crc32((ep.placement.to_json() + then.to_json()).encode())
    agree(ep.group, ours, _problem(ep, then), ep.layers[0].pass_load.device)
    for index, module in enumerate(layers.modules):
        for p in shards_of(module).values():
            for tensor in _kept_of(p, optimizer):
                rows = tensor.to_local()
                rows.copy_(moved(rows, ep.placement, then, index, ep.group))
        if not hasattr(module, "ray_ep_in_order"):
            hook: Any = InOrder(ep, index)
            module.ray_ep_in_order = hook
            module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(hook.refuse)  # type: ignore[no-untyped-call]
    ep.place(then, ep.node_of, ep.layers[0].pass_load.device)


class InOrder:
    """Hooks of one experts module: its rows in a state dict are those that transformers expects there."""

    def __init__(self, ep: ExpertParallel, index: int):
        self.ep, self.index = ep, index
        self.plain = contiguous(len(ep.layers), ep.num_experts, ep.group.size)

    @property
    def moved(self) -> bool:
        """Whether this layer's rows are elsewhere now."""
        return bool((self.ep.placement.owner[self.index] != self.plain.owner[self.index]).any())

    @torch.no_grad()
    def __call__(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Replace this module's rows by those of the contiguous placement (collective)."""
        for name, p in shards_of(module).items() if self.moved else ():
            rows = moved(state[prefix + name].to_local(), self.ep.placement, self.plain, self.index, self.ep.group)
            state[prefix + name] = DTensor.from_local(
                rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )

    def refuse(self, module: torch.nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        """Before weights are loaded: they would come to the wrong experts."""
        if self.moved and any(key.startswith(prefix) for key in state):
            raise ModelError(
                "experts were moved: weights are loaded in transformers' order; call "
                "ray_ep.hf.apply_placement(model, None) before load_state_dict"
            )


def moved(rows: torch.Tensor, now: Placement, then: Placement, layer: int, group: Group) -> torch.Tensor:
    """rows [S, ...] of one layer under `now` -> [S', ...] under `then` (collective); each expert is somewhere once."""
    before = {e: row for row, e in enumerate(now.experts_of(layer, group.rank))}
    after = then.experts_of(layer, group.rank)
    give = [[before[e] for e in then.experts_of(layer, r) if e in before] for r in range(group.size)]
    take = [[row for row, e in enumerate(after) if now.owner[layer, e] == r] for r in range(group.size)]
    sent = rows[[row for part in give for row in part]]
    received = rows.new_empty(len(after), *rows.shape[1:])
    group.all_to_all(received, sent, [len(part) for part in take], [len(part) for part in give])
    group.wait()
    out = torch.empty_like(received)
    out[[row for part in take for row in part]] = received
    return out


def _layers_of(model: torch.nn.Module) -> LayersOfModel:
    for module in model.modules():
        if isinstance(layers := getattr(module, "ray_ep_layers", None), LayersOfModel):
            return layers
    raise ModelError(
        f"{type(model).__name__} was not loaded with ray_ep: call from_pretrained with "
        'distributed_config=DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="ray_ep")'
    )


def _kept_of(p: torch.nn.Parameter, optimizer: Any) -> Iterator[Any]:
    """The parameter, and what an optimizer keeps for it, row by row."""
    yield p
    state = {} if optimizer is None else optimizer.state.get(p, {})
    yield from (t for t in state.values() if isinstance(t, DTensor) and t.shape == p.shape)


def _problem(ep: ExpertParallel, then: Placement) -> BadInput | None:
    """Why this rank cannot move to the placement now."""
    size, layers, experts = ep.group.size, len(ep.layers), ep.num_experts
    if (then.num_layers, then.num_experts, then.num_ranks) != (layers, experts, size):
        return PlacementError(
            f"placement is for {then.num_layers} layers x {then.num_experts} experts on {then.num_ranks} ranks; the "
            f"model has {layers} MoE layers x {experts} experts and its expert mesh {size} ranks"
        )
    held = np.array([[len(then.experts_of(i, r)) for r in range(size)] for i in range(layers)])
    if (held != experts // size).any():
        layer, rank = (int(n) for n in np.argwhere(held != experts // size)[0])
        return PlacementError(
            f"placement has {held[layer, rank]} experts on rank {rank} in layer {layer}: transformers keeps "
            f"{experts // size} on every rank, each expert once, so replicas and uneven shares need `ray-ep train` or "
            "ray_ep.moe.parallelize"
        )
    for index, module in enumerate(ep.modules):
        for name, p in shards_of(module).items():
            if p.grad is not None:
                return ModelError(
                    f"gradients are present (layer {index}, {name}): experts move between steps; apply or clear them "
                    "first (optimizer.step, then zero_grad)"
                )
            if p.to_local().shape[0] != experts // size:
                return ModelError(
                    f"layer {index}, {name}: several ranks share out each expert (efsdp_size above 1): experts cannot "
                    "move; ep_size = fsdp_size * tp_size keeps them whole"
                )
    return None
