"""Opens what other engines wrote and writes what they read: the kind of a file is told from its content, not its name.

The formats themselves are ray_ep.placement.engines (statistics) and engine_maps (placements); here are files only.
A .pt file is loaded with weights_only=True: a record cannot run code.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_ep.cli.engine_files import head_of, json_file, json_values, numpy_file, torch_bytes, torch_file, yaml_file
from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, RoutingStatistics
from ray_ep.placement.engine_maps import ENGINES, document, from_document
from ray_ep.placement.engines import Recorded, sglang_record, tensorrt_record, vllm_record

ALLOWED = (
    "ray_ep's own statistics (.npz); SGLang's expert-distribution records (.pt, or the directory with one a rank) or "
    "logical_count (.json); vLLM's routed experts (.npy, .npz of [tokens, layers, top_k], or responses as .json, "
    ".jsonl, or a directory of them); TensorRT-LLM's EXPERT_STATISTIC_PATH (a directory with meta_info.json)"
)
SUFFIXES = (".pt", ".npy", ".npz", ".json", ".jsonl")
"""Files of a directory that are looked at; the rest of it is nobody's record."""


def read_statistics(path: str | Path, num_experts: int | None = None) -> RoutingStatistics:
    """Routing statistics that ray_ep, SGLang, vLLM or TensorRT-LLM recorded; see `read_record`."""
    return read_record(path, num_experts).statistics


def read_record(path: str | Path, num_experts: int | None = None) -> Recorded:
    """Statistics with the engine's name and its layer numbers, of a file or a directory of one run's files.

    Args:
        num_experts: experts of a layer; needed where vLLM's output is too short to name the last of them.

    Raises:
        PlacementError: naming the file, what was found and what is allowed.
    """
    path = Path(path)
    if not path.exists():
        raise PlacementError(f"{path}: no such file or directory")
    if not path.is_dir():
        return _record([path], path, num_experts)
    if (path / "meta_info.json").exists():
        return _tensorrt(path)
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if not files:
        names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise PlacementError(f"{path}: holds {names}; allowed are {ALLOWED}")
    return _record(files, path, num_experts)


def read_placement(path: str | Path, ranks: int | None = None, layer_ids: Sequence[int] | None = None) -> Placement:
    """A placement of ray_ep, or one that SGLang, TensorRT-LLM or vllm-ascend starts from.

    Args:
        ranks: needed for SGLang's and TensorRT-LLM's files, which do not say it.
        layer_ids: the engine's layers to take, to leave dense ones out (`Recorded.layer_ids`).

    Raises:
        PlacementError: naming the file, what was found and what is allowed.
    """
    path = Path(path)
    head = head_of(path)
    tree = torch_file(path) if head.startswith(b"PK\x03\x04") else yaml_file(path)
    if not isinstance(tree, Mapping):
        raise PlacementError(f"{path}: holds a {type(tree).__name__}: expected a placement as a JSON or YAML mapping")
    if "slots" in tree:
        try:
            return Placement.from_json(json.dumps(tree, default=str))
        except PlacementError as e:
            raise PlacementError(f"{path}: {e}") from None
    return from_document(tree, str(path), ranks, layer_ids)


def write_placement(
    placement: Placement,
    engine: str,
    path: str | Path,
    layer_ids: Sequence[int] | None = None,
    num_layers: int | None = None,
) -> None:
    """Write the file that an engine starts from: ray_ep, sglang, vllm-ascend (JSON), tensorrt-llm (YAML).

    SGLang: `--init-expert-location PATH`, whose name must end in .json or .pt. TensorRT-LLM: `moe_config:
    {load_balancer: PATH}`. vLLM takes no map and is refused with the reason. `layer_ids` and `num_layers` are those of
    the `Recorded` that the placement was planned from; without them layers are numbered from 0.

    Raises:
        PlacementError: an unknown engine, a placement that the engine cannot take, a path that cannot be written.
    """
    path = Path(path)
    if engine not in ENGINES:
        raise PlacementError(f"engine {engine!r}: allowed are {', '.join(ENGINES)}")
    if engine == "sglang" and path.suffix not in (".json", ".pt"):
        raise PlacementError(f"{path}: SGLang reads a map from names that end in .json or .pt only")
    if engine == "ray_ep":
        content = placement.to_json().encode()
    else:
        tree = document(placement, engine, layer_ids, num_layers)
        if engine == "tensorrt-llm":
            # One line a layer: the lists are long, and PyYAML's own wrapping makes megabytes of lines.
            content = yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=float("inf")).encode()
        elif path.suffix == ".pt":
            content = torch_bytes(tree)
        else:
            content = json.dumps(tree).encode()
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)  # a reader never sees half a map
    except OSError as e:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise PlacementError(f"{path}: {e}") from None


def _record(files: Sequence[Path], where: Path, num_experts: int | None) -> Recorded:
    """All files of one engine and run."""
    sglang: list[tuple[str, Mapping[str, Any]]] = []
    vllm: list[tuple[str, Any]] = []
    for file in files:
        tree = _open(file)
        if isinstance(tree, RoutingStatistics):
            if len(files) > 1:
                raise PlacementError(f"{file}: ray_ep's statistics among other files in {where}: give one file")
            layers = len(tree.load)
            return Recorded(tree, "ray_ep", tuple(range(layers)), layers)
        if isinstance(tree, Mapping) and tree.keys() & {"logical_count", "records"}:
            sglang.append((str(file), tree))
        else:
            vllm += _routed(tree, str(file))
    if sglang and vllm:
        raise PlacementError(f"{where}: SGLang's {sglang[0][0]} and vLLM's {vllm[0][0]} together: give one engine's")
    if sglang:
        return sglang_record(sglang, num_experts)
    if not vllm:
        raise PlacementError(
            f"{where}: responses without routed experts: start vLLM with --enable-return-routed-experts"
        )
    return vllm_record(vllm, num_experts)


def _tensorrt(path: Path) -> Recorded:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    meta = json_file(path / "meta_info.json")
    if not isinstance(meta, Mapping):
        raise PlacementError(f"{path / 'meta_info.json'}: expected num_experts and num_experts_per_token")
    ranks = []
    # rank0.safetensors has the counts; names with more to them (rank0_raw, cooccurrence_rank0) are other things.
    for file in sorted(p for p in path.iterdir() if re.fullmatch(r"rank\d+\.safetensors", p.name)):
        try:
            ranks.append((str(file), load_file(file)))
        except (SafetensorError, OSError, ValueError) as e:
            raise PlacementError(f"{file}: not a safetensors file: {e}") from None
    return tensorrt_record(str(path), meta, ranks)


def _open(file: Path) -> Any:
    """What the file holds: statistics, an array, a mapping of a record, or JSON values."""
    head = head_of(file)
    if head.startswith(b"\x93NUMPY"):
        return numpy_file(file, np.load)
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(file).namelist()
        except (zipfile.BadZipFile, OSError) as e:
            raise PlacementError(f"{file}: a damaged zip archive (.pt or .npz): {e}") from None
        if any(name.endswith("data.pkl") for name in names):
            return torch_file(file)
        arrays = numpy_file(file, lambda f, allow_pickle: dict(np.load(f, allow_pickle=allow_pickle)))
        if "load" in arrays:
            return _own(file, arrays)
        return [{"routed_experts": a} for a in arrays.values()]
    if head[:1] in (b"{", b"["):
        return json_values(file)
    found = "an empty file" if not head else f"content that starts with {head[:8]!r}"
    raise PlacementError(f"{file}: {found}; allowed are {ALLOWED}")


def _own(file: Path, arrays: Mapping[str, Any]) -> RoutingStatistics:
    """What RoutingStatistics.save wrote."""
    try:
        return RoutingStatistics(**{f.name: arrays[f.name] for f in fields(RoutingStatistics) if f.name in arrays})
    except (TypeError, PlacementError) as e:
        raise PlacementError(f"{file}: {e}") from None


def _routed(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    """vLLM's arrays [T, L, K] in a response, a list of responses, or an array; prompts and completions alike."""
    if isinstance(tree, np.ndarray):
        yield where, tree
    elif isinstance(tree, list) and all(isinstance(x, Mapping) for x in tree):
        for i, item in enumerate(tree):
            yield from _routed(item, where if len(tree) == 1 else f"{where}: [{i}]")
    elif isinstance(tree, Mapping) and tree.keys() & {"choices", "outputs", "routed_experts", "prompt_routed_experts"}:
        for key in ("prompt_routed_experts", "routed_experts"):
            if tree.get(key) is not None:  # null: the request was aborted, or the server does not capture
                yield f"{where}: {key}", _array(tree[key], f"{where}: {key}")
        for key in ("choices", "outputs"):
            yield from _routed(tree.get(key) or [], f"{where}: {key}")
    else:
        found = f"keys {sorted(map(str, tree))[:8]}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise PlacementError(f"{where}: not a routing record, it holds {found}; allowed are {ALLOWED}")


def _array(value: Any, where: str) -> Any:
    """Nested lists (v0.21) as they are; base64 of .npy bytes (later) decoded."""
    if not isinstance(value, str):
        return value
    try:
        return np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as e:
        raise PlacementError(f"{where}: expected base64 of a .npy file: {e}") from None
