"""Opens what other engines wrote and writes what they read: the kind of a file is told from its content, not its name.

The formats themselves are ray_ep.placement.engines.records (statistics) and maps (placements); here are files only.
A .pt file is loaded with weights_only=True: a record cannot run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_ep.cli.engines.formats import (
    ALLOWED,
    head_of,
    holds,
    json_file,
    json_values,
    numpy_file,
    torch_bytes,
    torch_file,
    yaml_file,
)
from ray_ep.cli.engines.responses import NO_ROUTING, Routed, shaped
from ray_ep.cli.engines.twice import copies, twice, without_copies
from ray_ep.errors import PlacementError
from ray_ep.placement import Placement, RoutingStatistics
from ray_ep.placement.engines.maps import ENGINES, document, map_of, what_it_is
from ray_ep.placement.engines.records import Recorded, sglang_record, tensorrt_record, vllm_record

SUFFIXES = (".pt", ".npy", ".npz", ".json", ".jsonl")
"""Files of a directory that are looked at; the rest of it is nobody's record."""


def read_record(path: str | Path, num_experts: int | None = None, shape: tuple[int, int] | None = None) -> Recorded:
    """Statistics with the engine's name and its layer numbers, of a file or a directory of one run's files.

    Args:
        num_experts: experts of a layer; needed where a short output does not name the last of them.
        shape: layers and top_k of SGLang's routed experts, where its responses do not tell.

    Raises:
        PlacementError: naming the file, what was found and what is allowed.
    """
    path = Path(path)
    if not path.exists():
        raise PlacementError(f"{path}: no such file or directory")
    if not path.is_dir():
        return _record([path], path, num_experts, shape)
    try:
        there = sorted(path.iterdir())
    except OSError as e:
        raise PlacementError(f"{path}: {e.strerror or 'cannot be read'}") from None
    files = [p for p in there if p.suffix in SUFFIXES and p.is_file()]
    if (path / "meta_info.json").exists():
        beside = [p.name for p in files if p.name != "meta_info.json"]
        found = _tensorrt(path)
        words = f"TensorRT-LLM's statistics are read; {', '.join(beside[:5])} beside them are not"
        return replace(found, notes=(*found.notes, words)) if beside else found
    if not files:
        names = ", ".join(p.name for p in there[:5]) or "nothing"
        raise PlacementError(f"{path}: holds {names}; allowed are {ALLOWED}")
    return _record(files, path, num_experts, shape)


def read_placement(path: str | Path, ranks: int | None = None, layer_ids: Sequence[int] | None = None) -> Placement:
    """A placement of ray_ep, or one that SGLang, TensorRT-LLM or vllm-ascend starts from.

    Args:
        ranks: needed for SGLang's and TensorRT-LLM's files, which do not say it.
        layer_ids: the engine's layers to take, to leave dense ones out (`Recorded.layer_ids`).

    Raises:
        PlacementError: naming the file, what was found and what is allowed.
    """
    return read_map(path, ranks, layer_ids)[0]


def read_map(
    path: str | Path, ranks: int | None = None, layer_ids: Sequence[int] | None = None, layers: int | None = None
) -> tuple[Placement, tuple[str, ...]]:
    """`read_placement`, and what of the file was left out, in sentences.

    Args:
        layers: where layer_ids is None: how many to take, the first ones; None: all.
    """
    path = Path(path)
    head = head_of(path)
    tree = torch_file(path) if head.startswith(b"PK\x03\x04") else yaml_file(path)
    tree, path = _load_balancer(tree, path)
    if not isinstance(tree, Mapping):
        raise PlacementError(f"{path}: holds {holds(tree)}: expected a placement as a JSON or YAML mapping")
    if "slots" in tree:
        try:
            return Placement.from_json(json.dumps(tree, default=str)), ()
        except PlacementError as e:
            raise PlacementError(f"{path}: {e}") from None
        except (TypeError, ValueError, RecursionError):
            raise PlacementError(f"{path}: a placement whose keys or values are no plain numbers") from None
    return map_of(tree, str(path), ranks, layer_ids, layers)


def _load_balancer(tree: Any, path: Path) -> tuple[Any, Path]:
    """TensorRT-LLM's load balancer out of its LLM API options: given there as it is, or as the path of its file."""
    if not isinstance(tree, Mapping):
        return tree, path
    options = tree.get("moe_config")
    inner = options.get("load_balancer") if isinstance(options, Mapping) else tree.get("moe_load_balancer")
    if isinstance(inner, Mapping):
        return inner, path
    if not isinstance(inner, str):
        return tree, path
    for file in (path.parent / inner, Path(inner)):
        if file.is_file() and not file.samefile(path):
            return yaml_file(file), file
    raise PlacementError(f"{path}: its load_balancer is the file {inner}, which is not there: give that file")


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
        raise PlacementError(f"{path}: {e.strerror or 'cannot be written'}") from None


def _record(files: Sequence[Path], where: Path, num_experts: int | None, shape: tuple[int, int] | None) -> Recorded:
    """All files of one engine and run, a file that is there twice once."""
    sglang: list[tuple[str, Mapping[str, Any]]] = []
    routed, same = Routed(), copies(files)
    notes = [f"{file.name} is the same as {first.name} and is counted once" for file, first in same.items()]
    for file in files:
        if file in same:
            continue
        tree = _open(file)
        if isinstance(tree, RoutingStatistics):
            if len(files) > 1:
                raise PlacementError(
                    f"{file}: ray_ep's statistics among other files in {where}, which may be records of the same "
                    "tokens: give one file"
                )
            layers = len(tree.load)
            return Recorded(tree, "ray_ep", tuple(range(layers)), layers)
        if isinstance(tree, Mapping) and tree.keys() & {"logical_count", "records"}:
            sglang.append((str(file), tree))
        elif isinstance(tree, Mapping) and (what := what_it_is(tree)):
            raise PlacementError(f"{file}: {what}, not a routing record; {holds(tree)}; allowed are {ALLOWED}")
        else:
            routed.add(tree, str(file))
    found = _together(sglang, routed, where, num_experts, shape)
    return replace(found, notes=(*found.notes, *routed.notes(), *notes))


def _together(
    sglang: list[tuple[str, Mapping[str, Any]]],
    routed: Routed,
    where: Path,
    num_experts: int | None,
    shape: tuple[int, int] | None,
) -> Recorded:
    """One engine's documents as statistics."""
    kinds = [
        ("SGLang's", [name for name, _ in sglang]),
        ("vLLM's", [name for name, _ in routed.arrays]),
        ("SGLang's responses", [f.where for f in routed.flat]),
    ]
    have = [(kind, names[0]) for kind, names in kinds if names]
    if len(have) > 1:
        (a, first), (b, second) = have[:2]
        raise PlacementError(
            f"{where}: {a} {first} and {b} {second} together, which may be records of the same tokens: give one kind"
        )
    if sglang:
        once, notes = without_copies(sglang)
        found = sglang_record(once, num_experts)
        return replace(found, notes=(*found.notes, *notes))
    if routed.flat:
        arrays, words = shaped(routed.flat, shape)
        found = replace(vllm_record(arrays, num_experts), engine="sglang")
        return replace(found, notes=(words, *found.notes, *twice(arrays)))
    if not routed.arrays:
        raise PlacementError(f"{where}: {NO_ROUTING}")
    found = vllm_record(routed.arrays, num_experts)
    return replace(found, notes=(*found.notes, *twice(routed.arrays)))


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
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            raise PlacementError(f"{file}: not a safetensors file, or of a type that NumPy lacks") from None
    return tensorrt_record(str(path), meta, ranks)


def _open(file: Path) -> Any:
    """What the file holds: statistics, an array, a mapping of a record, or JSON values."""
    head = head_of(file)
    if head.startswith(b"\x93NUMPY"):
        return numpy_file(file, np.load)
    if head.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(file).namelist()
        except Exception:  # damaged bytes raise struct.error, BadZipFile and more
            raise PlacementError(f"{file}: a damaged zip archive (.pt or .npz)") from None
        if any(name.endswith("data.pkl") for name in names):
            return torch_file(file)
        arrays = numpy_file(file, lambda f, allow_pickle: dict(np.load(f, allow_pickle=allow_pickle)))
        if "load" in arrays:
            return _own(file, arrays)
        return [{"routed_experts": a} for a in arrays.values()]
    if head[:1] in (b"{", b"["):
        return json_values(file)
    if file.suffix in (".yaml", ".yml") and (tree := yaml_file(file)):
        return tree
    found = "an empty file" if not head else f"content that starts with {head[:8]!r}"
    raise PlacementError(f"{file}: {found}; allowed are {ALLOWED}")


def _own(file: Path, arrays: Mapping[str, Any]) -> RoutingStatistics:
    """What RoutingStatistics.save wrote."""
    try:
        return RoutingStatistics(**{f.name: arrays[f.name] for f in fields(RoutingStatistics) if f.name in arrays})
    except PlacementError as e:
        raise PlacementError(f"{file}: {e}") from None
    except (TypeError, ValueError):
        raise PlacementError(f"{file}: statistics that do not hold numbers") from None
