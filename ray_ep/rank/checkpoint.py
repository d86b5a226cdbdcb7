"""Checkpoints in logical (layer, expert) form: written by any number of ranks, read by any other number.

    step-000100/
        dense-0000.safetensors          weights and moments of the dense part, buffers
        experts-L003-r001.safetensors   what rank 1 owns of layer 3, one tensor per (expert, parameter, kind)
        statistics.npz                  routing statistics counted so far
        manifest.json                   written last: a directory without it is no checkpoint
Keys: `<kind>/<parameter>` and `<kind>/<parameter>/<expert>`, kind weight, exp_avg, exp_avg_sq, momentum_buffer, buffer.
Directories may be fsspec URLs. Nothing is stacked: memory stays at one file (a layer of a rank, or CHUNK dense bytes).
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ray_ep.errors import CheckpointError, PlacementError
from ray_ep.moe import ExpertParallel
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.optimizer import MasterOptimizer, Weight

CHUNK = 1 << 28
"""Bytes of dense tensors in one file, unless a single tensor is larger."""
MANIFEST = "manifest.json"
STATISTICS = "statistics.npz"


class Directory:
    """A local directory or fsspec URL that holds checkpoints `step-N`."""

    def __init__(self, url: str):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise CheckpointError(f"checkpoint directory {url!r}: {e}") from None
        self.url = url

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        if not self.fs.exists(self.root):
            return []
        names = [p.rstrip("/").rpartition("/")[2] for p in self.fs.ls(self.root, detail=False)]
        found = [int(m.group(1)) for n in names if (m := re.fullmatch(r"step-(\d+)", n))]
        return sorted(s for s in found if self.fs.exists(f"{self.path(s)}/{MANIFEST}"))

    def path(self, step: int) -> str:
        """Path of one checkpoint inside the file system."""
        return f"{self.root}/step-{step:06d}"

    def clear(self, step: int) -> None:
        """Remove what a crash may have left of a save of this step."""
        if self.fs.exists(self.path(step)):
            self._remove(step)
        self.fs.makedirs(self.path(step), exist_ok=True)

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` checkpoints (0: keep all); returns the removed steps."""
        old = self.steps()[:-keep] if keep else []
        for step in old:
            self._remove(step)
        return old

    def _remove(self, step: int) -> None:
        """The manifest first: a crash in between leaves no half checkpoint that looks whole."""
        if self.fs.exists(f"{self.path(step)}/{MANIFEST}"):
            self.fs.rm(f"{self.path(step)}/{MANIFEST}")
        self.fs.rm(self.path(step), recursive=True)

    def write_tensors(self, step: int, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
        """One safetensors file; returns {key: [file, checksum]} for the manifest."""
        tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        with tempfile.TemporaryDirectory() as tmp:
            local = Path(tmp) / name
            save_file(tensors, local)
            self.fs.put_file(str(local), f"{self.path(step)}/{name}")
        return {k: [name, checksum(t)] for k, t in tensors.items()}

    def commit(self, step: int, manifest: dict[str, Any], statistics: RoutingStatistics) -> None:
        """Make the checkpoint valid: the manifest comes last."""
        path = self.path(step)
        with tempfile.TemporaryDirectory() as tmp:
            statistics.save(f"{tmp}/{STATISTICS}")
            self.fs.put_file(f"{tmp}/{STATISTICS}", f"{path}/{STATISTICS}")
        with self.fs.open(f"{path}/{MANIFEST}.part", "w") as f:
            json.dump(manifest, f)
        self.fs.mv(f"{path}/{MANIFEST}.part", f"{path}/{MANIFEST}")  # whole or not at all


def checksum(t: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def save_rank(directory: Directory, step: int, model: Any, optimizer: MasterOptimizer) -> dict[str, list[Any]]:
    """Write what this rank owns (each rank calls; not collective); returns its part of the manifest's tensors."""
    ep: ExpertParallel = model.ray_ep
    rank = ep.group.rank
    tensors: dict[str, list[Any]] = {}
    if rank == 0:
        for i, part in enumerate(_chunks(_dense(model, optimizer))):
            tensors |= directory.write_tensors(step, f"dense-{i:04d}.safetensors", part)
    for layer in range(len(ep.layers)):
        part = dict(_experts(optimizer, ep, layer))
        if part:
            tensors |= directory.write_tensors(step, f"experts-L{layer:03d}-r{rank:03d}.safetensors", part)
    return tensors


class Checkpoint:
    """One checkpoint, opened for reading.

    Raises:
        CheckpointError: missing, incomplete or damaged.
    """

    def __init__(self, directory: Directory, step: int):
        self.directory, self.step = directory, step
        self.name = f"{directory.url}/step-{step:06d}"
        try:
            with directory.fs.open(f"{directory.path(step)}/{MANIFEST}") as f:
                self.manifest = json.load(f)
            self.tensors: dict[str, list[Any]] = self.manifest["tensors"]
            if self.manifest["step"] != step:
                raise ValueError(f"it says step {self.manifest['step']}")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"checkpoint {self.name}: unreadable manifest: {e!r}") from None
        self._open: dict[str, Any] = {}
        self._tmp = tempfile.TemporaryDirectory()

    def read(self, key: str) -> torch.Tensor:
        """One tensor, its checksum verified."""
        if key not in self.tensors:
            raise CheckpointError(f"checkpoint {self.name} has no {key}: it is of another model")
        name, want = self.tensors[key]
        try:
            if name not in self._open:
                self._open[name] = safe_open(self._local(name), "pt")
            tensor: torch.Tensor = self._open[name].get_tensor(key)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"checkpoint {self.name}: {name} is damaged or missing: {e}") from None
        if checksum(tensor) != want:
            raise CheckpointError(f"checkpoint {self.name}: {key} in {name} is damaged (checksum differs)")
        return tensor

    def statistics(self) -> RoutingStatistics:
        """Everything counted until the checkpoint."""
        try:
            return RoutingStatistics.load_file(self._local(STATISTICS))
        except (OSError, PlacementError) as e:
            raise CheckpointError(f"checkpoint {self.name}: {STATISTICS} is damaged or missing: {e}") from None

    def verify(self) -> None:
        """Read everything once; raises CheckpointError at the first damage."""
        for key in self.tensors:
            self.read(key)

    def _local(self, name: str) -> str:
        remote = f"{self.directory.path(self.step)}/{name}"
        if "file" in self.directory.fs.protocol:
            return remote
        local = f"{self._tmp.name}/{name}"
        self.directory.fs.get_file(remote, local)
        return local


@torch.no_grad()
def load_rank(checkpoint: Checkpoint, model: Any, optimizer: MasterOptimizer) -> None:
    """Fill this rank's masters, moments, buffers and compute weights (collective: replicas are sent)."""
    ep: ExpertParallel = model.ray_ep
    kinds = {k.partition("/")[0] for k in checkpoint.tensors} - {"weight", "buffer"}
    if kinds and kinds != set(optimizer.kinds):
        raise CheckpointError(
            f"checkpoint {checkpoint.name} holds {', '.join(sorted(kinds))}: it was written with another optim.kind "
            f"than {optimizer.cfg.kind}"
        )
    there = {k.split("/")[1] for k in checkpoint.tensors if k.startswith("weight/")}
    here = {w.name for w in optimizer.weights}
    if there != here:
        raise CheckpointError(
            f"checkpoint {checkpoint.name} is of another model: {sorted(there ^ here)[0]} is in one only"
        )
    for w in optimizer.weights:
        names = [w.name] if w.layer is None else [f"{w.name}/{e}" for e in _owned(ep, w.layer)]
        targets = [w.master] if w.layer is None else list(w.master)
        for name, target in zip(names, targets, strict=True):
            _copy(checkpoint, f"weight/{name}", target)
        moments = {k: torch.empty_like(w.master) for k in sorted(kinds)}
        for kind, moment in moments.items():
            for name, target in zip(names, [moment] if w.layer is None else list(moment), strict=True):
                _copy(checkpoint, f"{kind}/{name}", target)
        if moments:  # a checkpoint of before the first step has none
            optimizer.restore(w, moments, int(checkpoint.manifest["step"]))
    for name, buffer in _buffers(model):
        _copy(checkpoint, f"buffer/{name}", buffer)
    optimizer.publish()


def _copy(checkpoint: Checkpoint, key: str, target: torch.Tensor) -> None:
    source = checkpoint.read(key)
    if source.shape != target.shape:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: {key} has shape {tuple(source.shape)}, the model {tuple(target.shape)}: "
            "it is of another model"
        )
    target.copy_(source)


def _dense(model: Any, optimizer: MasterOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for w in optimizer.weights:
        if w.layer is None:
            yield from ((f"{kind}/{w.name}", t) for kind, t in _kinds(optimizer, w))
    yield from ((f"buffer/{n}", b) for n, b in _buffers(model))


def _experts(optimizer: MasterOptimizer, ep: ExpertParallel, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    for w in optimizer.weights:
        if w.layer == layer:
            for kind, stack in _kinds(optimizer, w):
                yield from ((f"{kind}/{w.name}/{e}", t) for e, t in zip(_owned(ep, layer), stack, strict=True))


def _kinds(optimizer: MasterOptimizer, w: Weight) -> list[tuple[str, torch.Tensor]]:
    return [("weight", w.master.detach()), *optimizer.moments(w).items()]


def _owned(ep: ExpertParallel, layer: int) -> list[int]:
    return ep.layers[layer].experts[: ep.layers[layer].owned]


def _buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Persistent buffers, such as routers' correction biases."""
    kept = set(model.state_dict())
    return [(n, b) for n, b in model.named_buffers() if n in kept]


def _chunks(items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for key, t in items:
        if part and size + t.nbytes > CHUNK:
            yield part
            part, size = {}, 0
        part[key] = t
        size += t.nbytes
    if part:
        yield part
