"""What other engines record about routing, as RoutingStatistics. Pure NumPy: documents in, statistics out.

Opening files is ray_ep.cli.engines.files; writing placements for those engines is maps.py beside this file.
Dimensions: P forward passes, T tokens, L layers, E experts, X physical experts (slots of all ranks), K top_k.

Sources of the formats (commits of public repositories, read in 2026):
- SGLang, python/sglang/srt/eplb/expert_distribution.py @ 02295fe and expert_location.py @ 01fec5c
- vLLM, docs/training/routed_experts_replay.md @ 0087e00 (v0.21), vllm/entrypoints/openai/completion/protocol.py
  @ 002032e, vllm/model_executor/layers/fused_moe/routed_experts_capturer.py @ 00bd149 (zeros where nothing is captured)
- TensorRT-LLM, tensorrt_llm/_torch/expert_statistic.py @ 0fccc5b and examples/ep_load_balancer/utils.py @ 9546c99
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_ep.errors import PlacementError
from ray_ep.placement.statistics import RoutingStatistics

Array = npt.NDArray[Any]
NamedDocument = tuple[str, Mapping[str, Any]]
"""One document and the name that errors call it by."""

SAMPLE = 8192
"""Tokens kept in `RoutingStatistics.sample`."""

MOST_EXPERTS = 4096
"""Ids from here on are taken for damage: pair counts of more experts would fill the memory."""

TOKENS_AT_ONCE = 1 << 15
"""Tokens whose pairs are counted at once: bounds the memory at TOKENS_AT_ONCE * K * K indices."""


@dataclass(frozen=True)
class Recorded:
    """Statistics and what is needed to write a placement back in the engine's own layer numbers.

    Args:
        statistics: of the MoE layers only.
        engine: ray_ep, sglang, vllm or tensorrt-llm.
        layer_ids: the engine's number of each layer in `statistics` (dense layers have numbers, too).
        num_layers: how many layers the engine counts, dense ones included.
        notes: what was left out and why, one sentence each.
    """

    statistics: RoutingStatistics
    engine: str
    layer_ids: tuple[int, ...]
    num_layers: int
    notes: tuple[str, ...] = ()


def sglang_record(dumps: Sequence[NamedDocument], num_experts: int | None = None) -> Recorded:
    """SGLang's expert-distribution dumps: one of mode stat (or several to add up), or one per rank of a detail mode.

    stat, stat_approx: `logical_count` [P, L, E], already summed over ranks; an --init-expert-location document with
    `logical_count` [L, E] or [P, L, E] reads the same. per_pass, per_token: `records`, each with
    `global_physical_count` [L, X] and, for per_token, `topk_ids_of_layer` [L, T, 8] (physical, -1 where unused), and
    one `last_physical_to_logical_map` [L, X]: counts before SGLang's last rebalancing are attributed by it, too.

    Raises:
        PlacementError: naming the document, what was found and what is allowed.
    """
    if all("logical_count" in tree for _, tree in dumps):
        counts = [_sglang_counts(name, tree) for name, tree in dumps]
        _same_shapes("sglang", [n for n, _ in dumps], counts)
        return _from_load("sglang", dumps[0][0], np.sum(counts, axis=0), num_experts)
    for name, tree in dumps:
        if "records" not in tree or "last_physical_to_logical_map" not in tree:
            raise PlacementError(
                f"{name}: not an SGLang expert-distribution record: its keys are {sorted(map(str, tree))}; expected "
                "logical_count (modes stat, stat_approx), or records and last_physical_to_logical_map (modes per_pass, "
                "per_token), the same in all files"
            )
    key = "last_physical_to_logical_map"
    maps = [_integers(f"{n}: {key}", t[key], 2).astype(np.int64) for n, t in dumps]
    _same_shapes("sglang", [n for n, _ in dumps], maps)
    for (name, _), to_logical in zip(dumps, maps, strict=True):
        top = num_experts or min(to_logical.shape[1], MOST_EXPERTS)  # every expert has a slot
        if to_logical.min(initial=0) < 0 or to_logical.max(initial=-1) >= top:
            raise PlacementError(f"{name}: {key} names experts outside 0 to {top - 1}")
    experts = num_experts or int(max(m.max(initial=-1) for m in maps)) + 1
    load = np.zeros((len(maps[0]), experts), np.int64)
    tokens: list[Array] = []
    for (name, tree), to_logical in zip(dumps, maps, strict=True):
        if not isinstance(tree["records"], Sequence):
            raise PlacementError(f"{name}: records is not a list")
        for i, record in enumerate(tree["records"]):
            where = f"{name}: records[{i}]"
            load += _logical(where, record, to_logical, experts)
            if "topk_ids_of_layer" in record:
                tokens.append(_sglang_tokens(where, record["topk_ids_of_layer"], to_logical))
    if tokens:
        return _from_tokens("sglang", dumps[0][0], tokens, experts)
    return _from_load("sglang", dumps[0][0], load, experts)


def vllm_record(outputs: Sequence[tuple[str, Array]], num_experts: int | None = None) -> Recorded:
    """vLLM's routed-experts output (`enable_return_routed_experts`): arrays [T, L, K] of logical expert ids.

    Rows of -1 (tokens from the prefix cache) and tokens that name an expert twice (rows that were never filled) are
    left out; a layer whose rows are all zero is a dense one. vLLM does not write the number of experts: without
    `num_experts` it is the highest id + 1.

    Raises:
        PlacementError: naming the output, what was found and what is allowed.
    """
    arrays = [_integers(f"{name}: routed experts", a, 3) for name, a in outputs]
    if not arrays:
        raise PlacementError("vllm: no routed experts: start vLLM with --enable-return-routed-experts")
    for (name, _), a in zip(outputs, arrays, strict=True):
        if a.shape[1:] != arrays[0].shape[1:]:
            raise PlacementError(
                f"{name}: routed experts of {a.shape[1]} layers and top {a.shape[2]}, but {outputs[0][0]} has "
                f"{arrays[0].shape[1]} and {arrays[0].shape[2]}: outputs of one model are expected"
            )
    experts = num_experts or min(max(_top(a) for a in arrays) + 1, MOST_EXPERTS)
    return _from_tokens("vllm", outputs[0][0], arrays, experts)


def tensorrt_record(where: str, meta: Mapping[str, Any], ranks: Sequence[tuple[str, Mapping[str, Array]]]) -> Recorded:
    """TensorRT-LLM's expert statistics: `meta_info.json` and of each rank counts [E] under "iteration_layer".

    Raises:
        PlacementError: naming the file, what was found and what is allowed.
    """
    experts = meta.get("num_experts")
    if type(experts) is not int or not 1 <= experts <= MOST_EXPERTS:
        raise PlacementError(f"{where}: meta_info.json has num_experts {experts!r}: expected 1 to {MOST_EXPERTS}")
    total: dict[int, npt.NDArray[np.int64]] = {}
    for name, arrays in ranks:
        for key, value in arrays.items():
            iteration, _, layer = key.partition("_")
            if not (iteration.isdigit() and layer.isdigit()):
                raise PlacementError(f"{name}: tensor {key!r}: expected names like 50_3 (iteration 50, layer 3)")
            counts = _counts(f"{name}: tensor {key}", value, 1)
            if len(counts) != experts:
                raise PlacementError(f"{name}: tensor {key} counts {len(counts)} experts, meta_info.json {experts}")
            total[int(layer)] = total.get(int(layer), np.zeros(experts, np.int64)) + counts
    if not total:
        raise PlacementError(f"{where}: no counts: expected rank0.safetensors, rank1.safetensors, …")
    load = np.zeros((max(total) + 1, experts), np.int64)
    for number, counts in total.items():
        load[number] = counts
    return _from_load("tensorrt-llm", where, load, experts)


def _sglang_counts(name: str, tree: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """[L, E] logical_count summed over passes."""
    counts = _counts(f"{name}: logical_count", tree["logical_count"], 2, 3)
    return counts.sum(0) if counts.ndim == 3 else counts


def _logical(
    where: str, record: Mapping[str, Any], to_logical: npt.NDArray[np.int64], experts: int
) -> npt.NDArray[np.int64]:
    """[L, E] one pass' physical counts, added up by logical expert."""
    if not isinstance(record, Mapping) or "global_physical_count" not in record:
        raise PlacementError(f"{where}: expected global_physical_count [layers, physical experts]")
    physical = _counts(f"{where}: global_physical_count", record["global_physical_count"], 2)
    if physical.shape != to_logical.shape:
        raise PlacementError(
            f"{where}: global_physical_count has shape {physical.shape}, last_physical_to_logical_map "
            f"{to_logical.shape}: they must agree"
        )
    out = np.zeros((len(physical), experts), np.int64)
    np.add.at(out, (np.arange(len(physical))[:, None], to_logical), physical)
    return out


def _sglang_tokens(where: str, ids: Any, to_logical: npt.NDArray[np.int64]) -> Array:
    """[T, L, K] logical ids of one pass, -1 where unused."""
    physical = _integers(f"{where}: topk_ids_of_layer", ids, 3)
    if len(physical) != len(to_logical) or _top(physical) >= to_logical.shape[1]:
        raise PlacementError(
            f"{where}: topk_ids_of_layer has shape {physical.shape} and ids up to {_top(physical)}: expected "
            f"{len(to_logical)} layers and ids below {to_logical.shape[1]}"
        )
    layers = np.arange(len(physical))[:, None, None]
    logical = np.where(physical >= 0, to_logical[layers, np.maximum(physical, 0)], -1)
    return logical.transpose(1, 0, 2)


def _from_load(engine: str, where: str, load: npt.NDArray[np.int64], num_experts: int | None) -> Recorded:
    """Counts only: layers without a token are dense ones."""
    if num_experts and num_experts != load.shape[1]:
        raise PlacementError(f"{where}: counts of {load.shape[1]} experts, but the model has {num_experts}")
    used = np.flatnonzero(load.any(1))
    if not len(used):
        raise PlacementError(f"{where}: no token was recorded")
    counts_only = "only counts were recorded, not which experts a token visits: load can be judged, links cannot"
    notes = (*_dense_note(len(load), len(used)), counts_only)
    return Recorded(RoutingStatistics(load[used]), engine, tuple(int(i) for i in used), len(load), notes)


def _from_tokens(engine: str, where: str, arrays: Sequence[Array], experts: int) -> Recorded:
    """Expert sets of tokens [T, L, K] -> loads, pairs, transitions and a sample, of the tokens that are whole."""
    top = max(_top(a) for a in arrays)
    if top >= experts:
        raise PlacementError(f"{where}: a token names expert {top}: allowed are 0 to {experts - 1}")
    small = np.int16 if experts <= np.iinfo(np.int16).max else np.int32  # a million tokens of 58 layers are 0.9 GB
    tokens = np.concatenate([a.astype(small) for a in arrays])
    # Nothing but -1 (SGLang) or nothing but 0 (vLLM) is what a dense layer's buffer holds.
    used = np.flatnonzero((tokens > 0).any((0, 2)))
    if not len(used):
        raise PlacementError(f"{where}: {len(tokens)} tokens and no routing: every id is 0 or -1")
    tokens = tokens[:, used]
    tokens = tokens[:, :, (tokens >= 0).any((0, 1))]
    ordered = np.sort(tokens, 2)
    whole = (ordered >= 0).all((1, 2)) & (ordered[:, :, 1:] != ordered[:, :, :-1]).all((1, 2))
    if not whole.any():
        raise PlacementError(
            f"{where}: none of {len(tokens)} tokens has {tokens.shape[2]} different experts in every layer: the engine "
            "did not capture routing"
        )
    notes = _dense_note(arrays[0].shape[1], len(used))
    if not whole.all():
        notes += (f"{(~whole).sum()} of {len(whole)} tokens were not captured in every layer and are left out",)
    statistics = _count(tokens[whole], experts)
    return Recorded(statistics, engine, tuple(int(i) for i in used), arrays[0].shape[1], notes)


def _count(tokens: Array, experts: int) -> RoutingStatistics:
    """Every count of whole tokens [T, L, K]; deterministic."""
    layers = tokens.shape[1]
    pairs = np.zeros((layers, experts, experts), np.int64)
    follow = np.zeros((max(layers - 1, 0), experts, experts), np.int64)
    for start in range(0, len(tokens), TOKENS_AT_ONCE):
        part = tokens[start : start + TOKENS_AT_ONCE].astype(np.int64)
        for layer in range(layers):
            here = part[:, layer, :, None] * experts
            pairs[layer] += _bins(here + part[:, layer, None, :], experts)
            if layer + 1 < layers:
                follow[layer] += _bins(here + part[:, layer + 1, None, :], experts)
    load = np.diagonal(pairs, axis1=1, axis2=2).copy()
    keep = np.sort(np.random.default_rng(0).permutation(len(tokens))[:SAMPLE])
    sample = tokens[keep].transpose(1, 0, 2).astype(np.int32, order="C")
    return RoutingStatistics(load, pairs, follow, sample)


def _bins(index: npt.NDArray[np.int64], experts: int) -> npt.NDArray[np.int64]:
    return np.bincount(index.ravel(), minlength=experts * experts).reshape(experts, experts)


def _dense_note(layers: int, used: int) -> tuple[str, ...]:
    return () if used == layers else (f"{layers - used} of {layers} layers routed no token (dense) and are left out",)


def _integers(what: str, value: Any, *dims: int) -> Array:
    """The value as integers with a number of dimensions that `dims` names; PlacementError otherwise."""
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise PlacementError(f"{what}: {e}") from None
    if array.ndim not in dims or array.dtype.kind not in "iu":
        allowed = " or ".join(map(str, dims))
        raise PlacementError(
            f"{what} has shape {array.shape} and type {array.dtype}: expected integers in {allowed} dimensions"
        )
    return array


def _top(array: Array) -> int:
    """The highest id, -1 where there is none."""
    return int(array.max()) if array.size else -1


def _counts(what: str, value: Any, *dims: int) -> npt.NDArray[np.int64]:
    """The value as counts, none negative; PlacementError otherwise."""
    counts = _integers(what, value, *dims).astype(np.int64)
    if counts.min(initial=0) < 0:
        raise PlacementError(f"{what} has a negative count, {counts.min()}")
    return counts


def _same_shapes(engine: str, names: Sequence[str], arrays: Sequence[npt.NDArray[np.int64]]) -> None:
    for name, array in zip(names, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise PlacementError(
                f"{name}: {engine} statistics of {array.shape} (layers, experts), but {names[0]} has "
                f"{arrays[0].shape}: files of one model are expected"
            )
