"""Placements in the file formats of other engines, both ways. Pure NumPy: documents in and out, no files.

Reading statistics is engines.py; opening files is ray_ep.cli.engines.
Dimensions: L MoE layers, E experts, R ranks, S slots, X = R * S physical experts.

No engine's file says which rank owns an expert or how replicas share tokens: primaries and shares stay behind.

Sources of the formats (commits of public repositories, read in 2026):
- SGLang, python/sglang/srt/eplb/expert_location.py @ 01fec5c: `--init-expert-location`, a .json or .pt document whose
  only key is physical_to_logical_map [layers of the model, X] (it is passed on as keyword arguments, so that a second
  key stops the server); dense layers have a row, too; X is E + --ep-num-redundant-experts, ranks in order.
- TensorRT-LLM, tensorrt_llm/llmapi/llm_args.py (MoeLoadBalancerConfig) and examples/ep_load_balancer/
  generate_eplb_config.py @ 195a8bd: YAML with num_slots = X, initial_global_assignments {layer number: [X]} and
  layer_updates_per_iter (0: fixed).
- vllm-ascend, vllm_ascend/eplb/core/eplb_utils.py @ 695bb39: `additional_config`
  eplb_config.expert_map_path, JSON by layer and device.
- vLLM itself, vllm/config/parallel.py EPLBConfig @ 00193b8: no setting names a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import Ints, Placement

ENGINES = ("ray_ep", "sglang", "vllm", "vllm-ascend", "tensorrt-llm")
"""What `document` writes for; vllm is here to be refused with the reason."""

NO_VLLM = (
    "vLLM cannot be started from a given expert map: its eplb_config has window_size, step_interval, "
    "num_redundant_experts, log_balancedness, log_balancedness_interval, use_async, policy and communicator, and "
    "--expert-placement-strategy knows linear and round_robin only. Proposals (pull requests 41141, 49572, 53022) are "
    "open; a build with 49572 takes the list under physical_to_logical_map of the sglang file, MoE layers only. "
    "Allowed: ray_ep, sglang, tensorrt-llm, vllm-ascend"
)


def document(
    placement: Placement,
    engine: str,
    layer_ids: Sequence[int] | None = None,
    num_layers: int | None = None,
    layer_updates_per_iter: int = 0,
) -> dict[str, Any]:
    """The placement as the engine's own document, of plain lists and numbers.

    Args:
        layer_ids: the engine's number of each MoE layer (`Recorded.layer_ids`); None: 0, 1, …
        num_layers: layers of the model with the dense ones (`Recorded.num_layers`; sglang only); None: up to the
            last of `layer_ids`.
        layer_updates_per_iter: tensorrt-llm only: layers it may rebalance by itself each iteration, 0 for none.

    Raises:
        PlacementError: an engine that takes no map, ranks with empty or uneven slots (engines want every slot of
            every rank filled), layer numbers that do not fit.
    """
    if engine not in ENGINES or engine == "ray_ep":
        raise PlacementError(f"engine {engine!r}: allowed are {', '.join(ENGINES)}")
    if engine == "vllm":
        raise PlacementError(NO_VLLM)
    slots = _filled(placement, engine)
    flat = slots.reshape(len(slots), -1) if slots.size else np.zeros((len(slots), 0), np.int64)
    numbers = _numbers(placement, layer_ids)
    if engine == "tensorrt-llm":
        return {
            "num_slots": flat.shape[1],
            "initial_global_assignments": {n: row.tolist() for n, row in zip(numbers, flat, strict=True)},
            "layer_updates_per_iter": layer_updates_per_iter,
        }
    if engine == "sglang":
        total = max(numbers, default=-1) + 1 if num_layers is None else num_layers
        if max(numbers, default=-1) >= total:
            raise PlacementError(f"layer number {max(numbers)} in a model of {total} layers: numbers start at 0")
        # What SGLang itself starts from (init_trivial) stands in for dense layers: nothing reads those rows.
        rows = np.tile(np.arange(flat.shape[1]) % placement.num_experts, (total, 1))
        rows[list(numbers)] = flat
        return {"physical_to_logical_map": rows.tolist()}
    return _ascend(slots)


def from_document(
    tree: Mapping[str, Any], where: str, ranks: int | None = None, layer_ids: Sequence[int] | None = None
) -> Placement:
    """The placement in an engine's document (sglang, tensorrt-llm or vllm-ascend, told apart by its keys).

    Args:
        ranks: R; the documents of sglang and tensorrt-llm do not say it.
        layer_ids: which of the engine's layers to take, in order (to leave dense ones out); None: all.

    Raises:
        PlacementError: naming `where`, what was found and what is allowed.
    """
    if "layer_list" in tree:
        slots = _read_ascend(tree, where, layer_ids)
    elif "physical_to_logical_map" in tree or "initial_global_assignments" in tree:
        slots = _by_rank(_read_flat(tree, where, layer_ids), where, ranks)
    else:
        raise PlacementError(
            f"{where}: not a placement: its keys are {sorted(map(str, tree))}; expected slots (ray_ep), "
            "physical_to_logical_map (sglang), initial_global_assignments (tensorrt-llm) or layer_list (vllm-ascend)"
        )
    try:
        return Placement(slots, int(slots.max(initial=-1)) + 1)
    except PlacementError as e:
        raise PlacementError(f"{where}: {e}") from None


def _filled(placement: Placement, engine: str) -> Ints:
    """[L, R, S] slots; every one must be filled, those aside that no rank fills in any layer."""
    filled = placement.slots >= 0
    count = filled.sum(2)
    most = int(count.max(initial=0))
    if (count < most).any():
        layer, rank = (int(x) for x in np.argwhere(count < most)[0])
        raise PlacementError(
            f"placement: rank {rank} fills {int(count[layer, rank])} slots in layer {layer}, others {most}: {engine} "
            f"wants as many on every rank, all filled: plan with one number of slots, such as --slots {most}"
        )
    return placement.slots[filled].reshape(*placement.slots.shape[:2], most)


def _numbers(placement: Placement, layer_ids: Sequence[int] | None) -> tuple[int, ...]:
    numbers = tuple(range(placement.num_layers)) if layer_ids is None else tuple(int(n) for n in layer_ids)
    if len(numbers) != placement.num_layers or len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise PlacementError(
            f"layer_ids {list(numbers)}: expected {placement.num_layers} different numbers from 0, one a layer of the "
            "placement"
        )
    return numbers


def _ascend(slots: Ints) -> dict[str, Any]:
    """vllm-ascend's map of slots [L, R, S]; it counts MoE layers only and keeps an expert at most once on a device."""
    for layer, ranks in enumerate(slots):
        for rank, row in enumerate(ranks):
            if len(np.unique(row)) != len(row):
                raise PlacementError(
                    f"placement: rank {rank} holds an expert twice in layer {layer}: vllm-ascend allows it once"
                )
    layers = [
        {
            "layer_id": layer,
            "device_count": len(ranks),
            "device_list": [{"device_id": r, "device_expert": row.tolist()} for r, row in enumerate(ranks)],
        }
        for layer, ranks in enumerate(slots)
    ]
    return {"moe_layer_count": len(slots), "layer_list": layers}


def _read_ascend(tree: Mapping[str, Any], where: str, layer_ids: Sequence[int] | None) -> Ints:
    try:
        by_number = {int(x["layer_id"]): [d["device_expert"] for d in x["device_list"]] for x in tree["layer_list"]}
    except (TypeError, KeyError, ValueError) as e:
        raise PlacementError(f"{where}: layer_list is not a list of layers with device_list: {e!r}") from None
    return _ints(f"{where}: layer_list", _pick(by_number, where, layer_ids), 3)


def _read_flat(tree: Mapping[str, Any], where: str, layer_ids: Sequence[int] | None) -> Ints:
    """[L, X] of sglang or tensorrt-llm."""
    if "physical_to_logical_map" in tree:
        key = "physical_to_logical_map"
        rows = _ints(f"{where}: {key}", tree[key], 2)
        by_number: dict[int, Any] = dict(enumerate(rows))
    else:
        key = "initial_global_assignments"
        if not isinstance(tree[key], Mapping) or not all(str(n).isdigit() for n in tree[key]):
            raise PlacementError(f"{where}: {key}: expected a list of experts under each layer number")
        by_number = {int(n): row for n, row in tree[key].items()}  # JSON makes numbers of keys into text
    flat = _ints(f"{where}: {key}", _pick(by_number, where, layer_ids), 2)
    if tree.get("num_slots", flat.shape[1]) != flat.shape[1]:
        raise PlacementError(f"{where}: num_slots is {tree['num_slots']}, but a layer lists {flat.shape[1]} slots")
    return flat


def _by_rank(flat: Ints, where: str, ranks: int | None) -> Ints:
    if ranks is None:
        raise PlacementError(
            f"{where}: the file does not say how many ranks its {flat.shape[1]} slots lie on: give ranks"
        )
    if ranks < 1 or flat.shape[1] % ranks:
        raise PlacementError(f"{where}: {flat.shape[1]} slots do not divide over {ranks} ranks")
    return flat.reshape(len(flat), ranks, -1)


def _pick(by_number: Mapping[int, Any], where: str, layer_ids: Sequence[int] | None) -> list[Any]:
    wanted = sorted(by_number) if layer_ids is None else layer_ids
    missing = [n for n in wanted if n not in by_number]
    if missing or not by_number:
        raise PlacementError(f"{where}: layers {missing} are missing: it has {sorted(by_number)}")
    return [by_number[n] for n in wanted]


def _ints(what: str, value: Any, dims: int) -> Ints:
    try:
        array = np.asarray(value)
    except ValueError:
        raise PlacementError(f"{what}: layers or ranks with different numbers of slots: expected the same") from None
    if array.ndim != dims or array.dtype.kind not in "iu":
        raise PlacementError(f"{what} has shape {array.shape} and type {array.dtype}: expected expert ids, {dims}-D")
    return array.astype(np.int64)
