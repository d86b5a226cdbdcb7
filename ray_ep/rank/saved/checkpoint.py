"""Checkpoints in logical (layer, expert) form: written by any number of ranks, read by any other number.

    step-000100/
        dense-0000.safetensors          weights and moments of the dense part, buffers
        experts-L003-r001.safetensors   what rank 1 owns of layer 3, one tensor per (expert, parameter, kind)
        statistics.npz                  routing statistics counted so far
        manifest.json                   which tensor is where, checksums, sizes; see `ray_ep.rank.saved.directory`
Keys: `<kind>/<parameter>` and `<kind>/<parameter>/<expert>`, kind weight, exp_avg, exp_avg_sq, momentum_buffer, buffer.
"""

from __future__ import annotations

import errno
import json
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ray_ep.errors import CheckpointError, PlacementError
from ray_ep.moe import ExpertParallel
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.directory import STATISTICS_FILE, Directory, OtherStep
from ray_ep.rank.saved.disk import checksum
from ray_ep.rank.saved.writing import write_rank
from ray_ep.rank.step.optimizer import MasterOptimizer, Weight

QUICK = 4 << 30
"""Bytes of a local checkpoint that are read and summed before a cluster is touched; more is left to the ranks."""


def save_rank(directory: Directory, step: int, model: Any, optimizer: MasterOptimizer) -> dict[str, list[Any]]:
    """Write what this rank owns (each rank calls; not collective); returns its part of the manifest's tensors."""
    ep: ExpertParallel = model.ray_ep
    layers = [_experts(optimizer, ep, layer) for layer in range(len(ep.layers))]
    return write_rank(directory, step, ep.group.rank, _dense(model, optimizer), layers)


class Checkpoint:
    """One checkpoint, opened for reading.

    Args:
        command: what to do with another checkpoint when this one is damaged, `{}` for its path.

    Raises:
        CheckpointError: missing, incomplete or damaged; it names a whole one beside it, if there is one.
    """

    def __init__(self, directory: Directory, step: int, command: str = ""):
        self.directory, self.step = directory, step
        self.name = f"{directory.url}/step-{step:06d}"
        self.command = command or _train(directory)
        self._open: dict[str, Any] = {}
        self._tmp: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.manifest = directory.manifest(step)
        except FileNotFoundError:
            raise self.damaged(
                "there is no complete checkpoint: manifest.json, which is written last, is missing"
            ) from None
        except OtherStep as e:
            raise CheckpointError(f"checkpoint {self.name}: its manifest is of another one: {e}") from None
        except (OSError, ValueError) as e:
            raise self.damaged(f"unreadable manifest: {e}") from None
        self.tensors: dict[str, list[Any]] = self.manifest["tensors"]

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
            raise self.damaged(f"{name} is damaged or missing: {e}") from None
        if checksum(tensor) != want:
            raise self.damaged(f"{key} in {name} is damaged (checksum differs)")
        return tensor

    def statistics(self) -> RoutingStatistics:
        """Everything counted until the checkpoint."""
        name = self.manifest.get("statistics", STATISTICS_FILE)
        try:
            return RoutingStatistics.load_file(self._local(name))
        except (OSError, PlacementError) as e:
            raise self.damaged(f"{name} is damaged or missing: {e}") from None

    def verify(self, most: int | None = None) -> None:
        """Everything that can be seen in the files: all are there, whole, with the tensors that the manifest names.

        Args:
            most: leave checksums of tensors to whoever reads them if there are more bytes, or they lie in a store.

        Raises:
            CheckpointError: at the first damage.
        """
        if fault := self.directory.fault(self.step, self.manifest):
            raise self.damaged(self._pointer(fault.partition(" ")[0]) or fault)
        self.statistics()
        self._check_complete()
        files: dict[str, list[str]] = defaultdict(list)
        for key, (name, _) in self.tensors.items():
            files[name].append(key)
        with ThreadPoolExecutor(8) as pool:
            headers = dict(zip(files, pool.map(self._header, files), strict=True))
            for name, keys in files.items():
                self._check_header(name, keys, headers[name])
            size = sum(end for header in headers.values() for _, end in header.values())
            if most is None or (self.directory.local and size <= most):
                list(pool.map(self._check_tensors, files.values()))

    def _check_complete(self) -> None:
        """Every weight of the model, and of each kind of moments as many: a manifest may be cut, too."""
        signature = self.manifest.get("signature") or {}
        frozen = set(self.manifest.get("frozen") or ())
        kinds = {k.partition("/")[0] for k in self.tensors} - {"buffer"} | {"weight"}
        for kind in sorted(kinds):
            for name, shape in signature.items():
                if kind != "weight" and name in frozen:
                    continue
                key = f"{kind}/{name}"
                parts = [key] if key in self.tensors or not shape else [f"{key}/{e}" for e in range(shape[0])]
                if lost := [k for k in parts if k not in self.tensors]:
                    raise self.damaged(f"its manifest lacks {key if len(lost) == len(parts) else lost[0]}")

    def _header(self, name: str) -> dict[str, tuple[list[int], int]]:
        """(shape, bytes) of each tensor of a file, from its first bytes alone: those of a store are not fetched."""
        fs, path = self.directory.fs, f"{self.directory.path(self.step)}/{name}"
        try:
            length = int.from_bytes(fs.cat_file(path, 0, 8), "little")
            if not 0 < length < 100_000_000:  # the format's own limit
                raise ValueError("not a safetensors file")
            tree = json.loads(fs.cat_file(path, 8, 8 + length))
            offsets = {k: (list(v["shape"]), v["data_offsets"]) for k, v in tree.items() if k != "__metadata__"}
            end = max((o[1] for _, o in offsets.values()), default=0)
            if fs.size(path) != 8 + length + end:
                raise ValueError(f"it has {fs.size(path):,} bytes instead of {8 + length + end:,}")
            return {k: (shape, int(o[1]) - int(o[0])) for k, (shape, o) in offsets.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise self.damaged(self._pointer(name) or f"{name} is damaged: {e}") from None

    def _check_header(self, name: str, keys: list[str], header: dict[str, tuple[list[int], int]]) -> None:
        if other := sorted(header.keys() ^ set(keys)):
            where = "not in it" if other[0] in keys else "not in the manifest"
            raise self.damaged(f"{name} is damaged or of another checkpoint: {other[0]} is {where}")
        signature = self.manifest.get("signature") or {}
        for key, (shape, _) in header.items():
            parameter, _, expert = key.partition("/")[2].partition("/")
            want = signature.get(parameter)
            if want is not None and shape != (want[1:] if expert else want):
                raise self.damaged(f"{key} in {name} has shape {shape}, the model {want[1:] if expert else want}")

    def _check_tensors(self, keys: list[str]) -> None:
        """Checksums of one file; CRC-32 lets other threads run."""
        for key in keys:
            self.read(key)
        self._open.pop(self.tensors[keys[0]][0])

    def _pointer(self, name: str) -> str:
        """What to say of a file that git-lfs has not fetched; empty if it is none."""
        with suppress(OSError):
            if self.directory.fs.cat_file(f"{self.directory.path(self.step)}/{name}", 0, 32).startswith(
                b"version http"
            ):
                return f"{name} is a pointer of git-lfs, not the file: `git lfs pull` there fetches it"
        return ""

    def damaged(self, what: str) -> CheckpointError:
        """The error, with the command that takes the newest whole checkpoint beside this one."""
        with suppress(Exception):  # it is only advice
            steps = [e.step for e in self.directory.entries()]
            at = steps.index(self.step) if self.step in steps else len(steps)
            for step in [*steps[:at][::-1], *steps[at + 1 :][::-1]]:
                with suppress(CheckpointError):
                    _Candidate(self.directory, step).verify(QUICK)
                    command = self.command.replace("{}", shlex.quote(f"{self.directory.url}/step-{step:06d}"))
                    return CheckpointError(f"checkpoint {self.name}: {what}; step {step} is whole: {command}")
        return CheckpointError(f"checkpoint {self.name}: {what}; there is no other whole one beside it")

    def _local(self, name: str) -> str:
        remote = f"{self.directory.path(self.step)}/{name}"
        if self.directory.local:
            return remote
        try:
            self._tmp = self._tmp or tempfile.TemporaryDirectory()
            local = f"{self._tmp.name}/{name}"
            self.directory.fs.get_file(remote, local)
        except OSError as e:
            if self._tmp is not None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = Path(self._tmp.name).parent if self._tmp else "TMPDIR"
            raise CheckpointError(
                f"checkpoint {self.name}: {name} is fetched into the temporary directory {where} (TMPDIR) and cannot "
                f"be: {e.strerror or e}; make room there, or name another one with TMPDIR"
            ) from None
        return local


class _Candidate(Checkpoint):
    """One that may be advised in place of another: what is wrong with it needs no advice."""

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(what)


def _train(directory: Directory) -> str:
    """The command that goes on from a checkpoint, in the run that it belongs to if it lies there."""
    run = Path(directory.url).parent
    known = directory.local and (run / "config.yaml").is_file()
    return f"ray-ep train {shlex.quote(f'run_dir={run}')} resume={{}}" if known else "ray-ep train resume={}"


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
    here = {w.name for w in optimizer.parameters}
    if there != here:
        raise CheckpointError(
            f"checkpoint {checkpoint.name} is of another model: {sorted(there ^ here)[0]} is in one only"
        )
    found: dict[str, dict[str, torch.Tensor]] = {}  # a checkpoint of before the first step has none
    for w in optimizer.weights:
        names = [w.name] if w.layer is None else [f"{w.name}/{e}" for e in _owned(ep, w.layer)]
        targets = [w.master] if w.layer is None else list(w.master)
        for name, target in zip(names, targets, strict=True):
            _copy(checkpoint, f"weight/{name}", target)
        # A weight that was frozen until now has no moments there.
        had = [k for k in sorted(kinds) if not names or f"{k}/{names[0]}" in checkpoint.tensors]
        found[w.name] = {k: torch.empty_like(w.master.data) for k in had}
        for kind, moment in found[w.name].items():
            for name, target in zip(names, [moment] if w.layer is None else list(moment), strict=True):
                _copy(checkpoint, f"{kind}/{name}", target)
    for frozen in optimizer.frozen:
        rows = [(frozen.name, frozen.param.data)]
        if frozen.layer is not None:  # replicas too: nobody sends them
            held = ep.layers[frozen.layer].experts
            rows = [(f"{frozen.name}/{e}", row) for e, row in zip(held, frozen.param.data, strict=True)]
        for name, target in rows:
            _copy(checkpoint, f"weight/{name}", target)
    for name, buffer in persistent_buffers(model):
        _copy(checkpoint, f"buffer/{name}", buffer)
    optimizer.restore(found, int(checkpoint.manifest["step"]))


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
    yield from ((f"weight/{f.name}", f.param.data.float()) for f in optimizer.frozen if f.layer is None)
    yield from ((f"buffer/{n}", b) for n, b in persistent_buffers(model))


def _experts(optimizer: MasterOptimizer, ep: ExpertParallel, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    for w in optimizer.weights:
        if w.layer == layer:
            for kind, stack in _kinds(optimizer, w):
                yield from ((f"{kind}/{w.name}/{e}", t) for e, t in zip(_owned(ep, layer), stack, strict=True))
    for f in optimizer.frozen:
        if f.layer == layer:
            rows = zip(_owned(ep, layer), f.param.data, strict=False)  # those that are owned come first
            yield from ((f"weight/{f.name}/{e}", row.float()) for e, row in rows)


def _kinds(optimizer: MasterOptimizer, w: Weight) -> list[tuple[str, torch.Tensor]]:
    return [("weight", w.master.detach()), *w.moments.items()]


def _owned(ep: ExpertParallel, layer: int) -> list[int]:
    return ep.layers[layer].experts[: ep.layers[layer].owned]


def persistent_buffers(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Persistent buffers, such as routers' correction biases."""
    kept = set(model.state_dict())
    return [(n, b) for n, b in model.named_buffers() if n in kept]
