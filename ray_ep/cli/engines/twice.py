"""Records that are there twice in what was given: the same file, the same counts, the same passes, the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.errors import PlacementError


def copies(files: Sequence[Path]) -> dict[Path, Path]:
    """For each file whose content an earlier one has, that one."""
    by_size: dict[int, list[Path]] = {}
    found, digests = {}, dict[bytes, Path]()
    try:
        for file in files:
            by_size.setdefault(file.stat().st_size, []).append(file)
        for alike in by_size.values():
            for file in alike if len(alike) > 1 else []:
                first = digests.setdefault(_digest(file), file)
                if first is not file:
                    found[file] = first
    except OSError as e:
        raise PlacementError(f"{e.filename}: {e.strerror or 'cannot be read'}") from None
    return found


def _digest(file: Path) -> bytes:
    found = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            found.update(block)
    return found.digest()


def without_copies(
    dumps: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """SGLang's documents with each count and each rank's pass once, and what was left out, in sentences."""
    kept: list[tuple[str, Mapping[str, Any]]] = []
    seen: dict[tuple[Any, ...], str] = {}
    notes: list[str] = []
    for name, tree in dumps:
        counts, records = _content(tree.get("logical_count"), True), tree.get("records")
        if counts is not None:
            first = seen.setdefault((counts,), name)
            if first is not name:
                notes.append(f"{name} holds the same counts as {first} and is counted once")
                continue
        if isinstance(records, list):
            new = [r for r in records if not isinstance(r, Mapping) or seen.setdefault(_pass(r, tree), name) is name]
            if len(new) < len(records):
                notes.append(f"{len(records) - len(new)} of {len(records)} passes of {name} are in another file too")
            tree = {**tree, "records": new}
        kept.append((name, tree))
    return kept, notes


def twice(arrays: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """A sentence for each two files whose responses hold the same tokens; they count, for tokens have no names."""
    by_file: dict[str, list[Any]] = {}
    for where, array in arrays:
        by_file.setdefault(where.split(": ")[0], []).append(array)
    seen: dict[tuple[bytes | None, ...], str] = {}
    notes = []
    for file, parts in by_file.items():
        first = seen.setdefault(tuple(_content(p) for p in parts), file)
        if first != file:
            notes.append(f"{file} holds the same routing as {first}: it is counted twice; give one of them")
    return tuple(notes)


def _pass(record: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one rank's forward pass from every other."""
    names = (str(record.get(k, tree.get(k))) for k in ("rank", "forward_pass_id", "gatherer_key"))
    return *names, _content(record.get("global_physical_count")), _content(record.get("topk_ids_of_layer"))


def _content(value: Any, summed: bool = False) -> bytes | None:
    """Digest of numbers, whatever their type; None: there are none. summed: over passes, where there are three axes."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if array.dtype.kind not in "iu":  # what is wrong with it is said by who reads it
        return None
    array = array.astype(np.int64)
    array = array.sum(0) if summed and array.ndim == 3 else array
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()
