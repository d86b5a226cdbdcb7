"""Placements in the file formats of other engines, both ways. Pure NumPy: documents in and out, no files.

Reading statistics is engines.py; opening files is ray_ep.cli.engines.files.
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

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.placement.engines.records import MOST_EXPERTS
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
"""Why there is no map for vLLM: words for the user who asks for one."""


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


def map_of(
    tree: Mapping[str, Any],
    where: str,
    ranks: int | None = None,
    layer_ids: Sequence[int] | None = None,
    layers: int | None = None,
) -> tuple[Placement, tuple[str, ...]]:
    """The placement in an engine's document (sglang, tensorrt-llm or vllm-ascend, told apart by its keys).

    Args:
        ranks: R; the documents of sglang and tensorrt-llm do not say it.
        layer_ids: which of the engine's layers to take, in order (to leave dense ones out); None: all.
        layers: where layer_ids is None: how many to take, the first ones; None: all.

    Returns:
        the placement, and what of the document was left out, in sentences.

    Raises:
        PlacementError: naming `where`, what was found and what is allowed.
    """
    if "layer_list" in tree:
        slots, notes = _read_ascend(tree, where, len(layer_ids) if layer_ids is not None else layers)
    elif "physical_to_logical_map" in tree or "initial_global_assignments" in tree:
        flat, notes = _read_flat(tree, where, layer_ids, layers)
        slots = _by_rank(flat, where, ranks)
    else:
        what = what_it_is(tree) or f"not a placement: its keys are {sorted(map(str, tree))[:8]}"
        more = ""
        if _is_online(tree):
            each = tree.get("num_slots")
            slots_each = f" ({each} slots on {ranks} ranks)" if isinstance(each, int) and ranks else ""
            more = (
                f". There is nothing in it that tells where experts are{slots_each}: leave it out, and what is "
                "compared with is the order that it starts from"
            )
        raise PlacementError(
            f"{where}: {what}{more}; expected slots (ray_ep), physical_to_logical_map (sglang), "
            "initial_global_assignments (tensorrt-llm) or layer_list (vllm-ascend)"
        )
    if slots.size and slots.max() >= MOST_EXPERTS:
        raise PlacementError(f"{where}: names expert {slots.max()}: ids below {MOST_EXPERTS} are expected")
    try:
        return Placement(slots, int(slots.max(initial=-1)) + 1), notes
    except PlacementError as e:
        raise PlacementError(f"{where}: {e}") from None


def what_it_is(tree: Mapping[str, Any]) -> str:
    """A document that is no record of routing, in words; "" where it is none that is known."""
    if "initial_global_assignments" in tree:
        return "TensorRT-LLM's load balancer configuration with a placement (--current takes it)"
    if _is_online(tree):
        said = ", ".join(f"{k} {tree[k]}" for k in ("num_slots", "layer_updates_per_iter") if k in tree)
        return (
            f"TensorRT-LLM's load balancer configuration ({said}) without initial_global_assignments: the engine "
            "places experts by itself while it serves"
        )
    if "moe_config" in tree or "moe_load_balancer" in tree:
        return "TensorRT-LLM's LLM API options, with no placement under moe_config.load_balancer"
    if "physical_to_logical_map" in tree:
        return "a placement of SGLang (--current takes it)"
    if "layer_list" in tree:
        return "a placement of vllm-ascend (--current takes it)"
    if "slots" in tree and "num_experts" in tree:
        return "a placement of ray_ep (--current takes it)"
    if tree.keys() & {"logical_count", "records"}:
        return "a record of routing, not a placement"
    return ""


def _is_online(tree: Mapping[str, Any]) -> bool:
    return bool(tree.keys() & {"num_slots", "layer_updates_per_iter"}) and "initial_global_assignments" not in tree


def _filled(placement: Placement, engine: str) -> Ints:
    """[L, R, S] slots; every one must be filled, those aside that no rank fills in any layer."""
    filled = placement.slots >= 0
    count = filled.sum(2)
    most = int(count.max(initial=0))
    if (count < most).any():
        layer, rank = (int(x) for x in np.argwhere(count < most)[0])
        raise PlacementError(
            f"placement: rank {rank} fills {int(count[layer, rank])} of {most} slots in layer {layer}: {engine} "
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


def _read_ascend(tree: Mapping[str, Any], where: str, layers: int | None) -> tuple[Ints, tuple[str, ...]]:
    """Slots [L, R, S]. It counts MoE layers only, in order: where layer_id is missing, that is their number."""
    found = tree["layer_list"]
    rows: dict[int, Any] = {}
    for i, layer in enumerate(found if isinstance(found, list) else []):
        number = layer.get("layer_id", i) if isinstance(layer, Mapping) else None
        devices = layer.get("device_list") if isinstance(layer, Mapping) else None
        each = [d.get("device_expert") for d in devices or [] if isinstance(d, Mapping)] if _lists(devices) else []
        if type(number) is not int or number < 0 or not each or not all(map(_lists, each)):
            raise PlacementError(
                f"{where}: layer_list is not a list of layers: number {i} is no mapping with device_list, a list of "
                "mappings with device_expert (a list of expert ids), and layer_id, a number that may be left out"
            )
        if number in rows:
            raise PlacementError(f"{where}: layer_list[{i}]: layer_id {number} is there twice")
        rows[number] = each
    if not rows:
        raise PlacementError(f"{where}: layer_list is not a list of layers: it holds none")
    numbers, notes = _first(sorted(rows), layers, where)
    return _ints(f"{where}: layer_list", [rows[n] for n in numbers], 3), notes


def _lists(value: Any) -> bool:
    return isinstance(value, list)


def _first(numbers: list[int], layers: int | None, where: str) -> tuple[list[int], tuple[str, ...]]:
    """The first `layers` of a map's layers: what a model has beyond its own layers (MTP) comes after them."""
    if layers is None or len(numbers) == layers:
        return numbers, ()
    if len(numbers) < layers:
        raise PlacementError(f"{where}: a placement of {len(numbers)} MoE layers, the statistics are of {layers}")
    rest = ", ".join(map(str, numbers[layers:][:8]))
    return numbers[:layers], (
        f"{where}: a placement of {len(numbers)} layers, the statistics are of {layers}: its last ({rest}), as an MTP "
        "layer is, are left out",
    )


def _read_flat(
    tree: Mapping[str, Any], where: str, layer_ids: Sequence[int] | None, layers: int | None
) -> tuple[Ints, tuple[str, ...]]:
    """[L, X] of sglang or tensorrt-llm."""
    if "physical_to_logical_map" in tree:
        key = "physical_to_logical_map"
        by_number: dict[int, Any] = dict(enumerate(_ints(f"{where}: {key}", tree[key], 2)))
    else:
        key = "initial_global_assignments"
        if not isinstance(tree[key], Mapping) or not all(re.fullmatch("[0-9]{1,6}", str(n)) for n in tree[key]):
            raise PlacementError(f"{where}: {key}: expected a list of experts under each layer number")
        by_number = {int(str(n)): row for n, row in tree[key].items()}  # JSON makes numbers of keys into text
    if layer_ids is None:
        wanted, notes = _first(sorted(by_number), layers, where)
    else:
        wanted = [int(n) for n in layer_ids]
        left = len(set(by_number) - set(wanted)) if key == "initial_global_assignments" else 0
        notes = (f"{where}: {left} of its layers are not among the statistics' and are left out",) if left else ()
    flat = _ints(f"{where}: {key}", _pick(by_number, where, wanted), 2)
    if tree.get("num_slots", flat.shape[1]) != flat.shape[1]:
        raise PlacementError(f"{where}: num_slots is {tree['num_slots']}, but a layer lists {flat.shape[1]} slots")
    return flat, notes


def _by_rank(flat: Ints, where: str, ranks: int | None) -> Ints:
    if ranks is None:
        raise PlacementError(
            f"{where}: the file does not say how many ranks its {flat.shape[1]} slots lie on: give ranks"
        )
    if ranks < 1 or flat.shape[1] % ranks:
        raise PlacementError(f"{where}: {flat.shape[1]} slots do not divide over {ranks} ranks")
    return flat.reshape(len(flat), ranks, -1)


def _pick(by_number: Mapping[int, Any], where: str, wanted: Sequence[int]) -> list[Any]:
    missing = [n for n in wanted if n not in by_number]
    if missing or not by_number:
        raise PlacementError(f"{where}: layers {missing[:8]} are missing: it has {sorted(by_number)[:8]}")
    return [by_number[n] for n in wanted]


def _ints(what: str, value: Any, dims: int) -> Ints:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise PlacementError(f"{what}: layers or ranks with different numbers of slots: expected the same") from None
    if array.ndim != dims or array.dtype.kind not in "iu":
        raise PlacementError(f"{what} has shape {array.shape} and type {array.dtype}: expected expert ids, {dims}-D")
    return array.astype(np.int64)
