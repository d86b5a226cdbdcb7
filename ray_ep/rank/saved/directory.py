"""A directory of checkpoints: which are there and whole, how one is written, replaced and removed. Local or fsspec.

Counted and removed are only directories named exactly `step-NNNNNN` whose manifest is of that step and names files that
are there in their sizes; whatever else lies beside or in them is left alone. The order is that in which they were
written (`serial` in the manifest), not that of their steps: after going on from an older one, those of the steps that
are taken anew are the first to go.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch

from ray_ep.errors import CheckpointError, SaveError
from ray_ep.placement import RoutingStatistics
from ray_ep.rank.saved.disk import checksum, in_one_line, remedy, save_tensors, sync, temporary

MANIFEST = "manifest.json"
"""Name of the file that lists all others of a checkpoint. It is written last: a checkpoint without it is not one."""

STATISTICS_FILE = "statistics.npz"
"""Name of the routing statistics inside a checkpoint."""

APPEARS_S = 10.0
"""Seconds that a file which another machine wrote may take to show up here."""

_NAME = re.compile(r"(dense-\d+|experts-L\d+-r\d+|statistics)(-[0-9a-f]{8})?\.(safetensors|npz)|manifest\.json\.part")
_CUT_SHORT = re.compile(r"\.tmp\w{6}")
"""What safetensors calls a file that it has not finished."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint that was committed once: `fault` says what is wrong with its files now, empty if nothing is."""

    step: int
    serial: int
    fault: str = ""


class Directory:
    """A local directory or fsspec URL that holds checkpoints `step-NNNNNN`."""

    def __init__(self, url: str):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise CheckpointError(f"checkpoint directory {url!r}: {e}") from None
        self.url = url
        self.local = "file" in self.fs.protocol
        self._serial: int | None = None  # of the last save

    def path(self, step: int) -> str:
        """Path of one checkpoint inside the file system."""
        return f"{self.root}/step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return [e.step for e in self.entries() if not e.fault]

    def newest(self) -> int | None:
        """Step of the checkpoint that was written last, whole or not: a damaged one is not passed over in silence."""
        found = self.entries()
        return found[-1].step if found else None

    def entries(self) -> list[Entry]:
        """All checkpoints that were committed, whole or damaged, oldest first."""
        found: list[Entry] = []
        for step in self._there():
            entry = self._inspect(step, found[-1].serial if found else 0)
            found += [entry] if entry is not None else []
        # Left behind: a later save is of the same or an earlier step, so the run went on from before this one.
        behind = {e.step for e in found if any(o.serial > e.serial and o.step < e.step for o in found)}
        return sorted(found, key=lambda e: (e.step not in behind, e.serial, e.step))

    def manifest(self, step: int) -> dict[str, Any]:
        """What one checkpoint consists of.

        Raises:
            FileNotFoundError: the save was never finished. ValueError: it is damaged, or of another step.
        """
        manifest = json.loads(self.fs.cat_file(f"{self.path(step)}/{MANIFEST}"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("step"), int):
            raise ValueError("it does not say of which step it is")
        if manifest["step"] != step:
            raise OtherStep(f"it is of step {manifest['step']}")
        if manifest.get("format", 1) != 1:
            raise ValueError(f"format {manifest['format']} is of another version of ray_ep; this one reads format 1")
        tensors, files = manifest.get("tensors"), manifest.get("files", {})
        if not isinstance(tensors, dict) or not isinstance(files, dict):
            raise ValueError("it does not name its tensors")
        if not all(isinstance(v, list) and len(v) == 2 and _plain(v[0]) for v in tensors.values()):
            raise ValueError("it does not say where its tensors are")
        if not all(_plain(n) and isinstance(size, int) for n, size in files.items()):
            raise ValueError("its list of files is damaged")
        return manifest

    def fault(self, step: int, manifest: dict[str, Any]) -> str:
        """What is wrong with the files of a checkpoint, as far as their sizes tell; empty: nothing."""
        wanted: dict[str, int | None] = dict.fromkeys(name for name, _ in manifest["tensors"].values())
        wanted |= manifest.get("files", {})  # manifests of before sizes were kept have none
        have = self._sizes(step, wanted)
        for name, size in sorted(wanted.items()):
            if name not in have:
                return f"{name} is missing"
            if size is not None and have[name] != size:
                return f"{name} is damaged: it has {have[name]:,} bytes instead of {size:,}"
        return ""

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the writing and the commit of a checkpoint: whatever ends it early leaves no files of it."""
        self.clear(step)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the first error is the one that matters
                self._sweep(step)
                self._drop_empty(step)
            raise

    def clear(self, step: int) -> None:
        """Make room for a save: what a crash left of one of this step goes; a whole checkpoint stays until `commit`.

        What is committed there and not whole, or of another step, is moved to a name beside it.

        Raises:
            SaveError: nothing can be written there.
        """
        with self._told(step, "its directory"):
            self.fs.invalidate_cache()
            if self.fs.isfile(self.path(step)):
                raise FileExistsError(errno.EEXIST, "a file of that name is in the way")
            if self._serial is None:
                self._serial = max((e.serial for e in self.entries()), default=0)
            if self.fs.isdir(self.path(step)):
                self._put_aside(step)
            self.fs.makedirs(self.path(step), exist_ok=True)
            self._sweep(step)

    def next_serial(self) -> int:
        """Number of the next save in this directory, for the manifest; after `clear`."""
        self._serial = (self._serial or 0) + 1
        return self._serial

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` whole checkpoints (0: keep all); returns the removed steps.

        Raises:
            SaveError: one could not be removed; the others are.
        """
        removed, failed = [], None
        for step in self.steps()[:-keep] if keep > 0 else []:
            if self.local and os.path.islink(self.path(step)):  # somebody else's, shown here
                continue
            try:
                self._remove(step)
                removed.append(step)
            except OSError as e:
                failed = failed or SaveError(
                    f"checkpoint {self.url}/step-{step:06d} is not needed any more (the newest {keep} are kept) and "
                    f"could not be removed: {in_one_line(e)}"
                )
        if failed:
            raise failed
        return removed

    def tidy(self) -> None:
        """Remove what saves left behind that were never finished; nobody may be saving here.

        Raises:
            OSError: something could not be removed.
        """
        for step in self._there():
            if not self.fs.exists(f"{self.path(step)}/{MANIFEST}"):
                self._sweep(step)
                self._drop_empty(step)

    def empty(self) -> None:
        """Remove every checkpoint, finished or not, and then the directory if nothing is left; as `tidy`."""
        self.tidy()
        for entry in self.entries():
            self._remove(entry.step)
        with suppress(OSError):  # not there, or somebody has something in it
            self.fs.rmdir(self.root)

    def write_tensors(self, step: int, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
        """One safetensors file; returns {key: [file, checksum, bytes of the file]} for `commit`.

        Raises:
            SaveError: it could not be written.
        """
        tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        name = self._name(step, name)
        total = sum(t.nbytes for t in tensors.values())
        size = self._write(step, name, lambda path: save_tensors(tensors, path), total)
        return {k: [name, checksum(t), size] for k, t in tensors.items()}

    def commit(self, step: int, manifest: dict[str, Any], statistics: RoutingStatistics) -> None:
        """Make the checkpoint valid: the manifest comes last, and takes the place of an earlier one of this step.

        `manifest["tensors"]` is what `write_tensors` returned on all ranks.

        Raises:
            SaveError: it could not be written, or what other ranks wrote is not there.
        """
        name = self._name(step, STATISTICS_FILE)
        files = {name: self._write(step, name, statistics.save)}
        files |= {v[0]: v[2] for v in manifest["tensors"].values()}
        tensors = {k: v[:2] for k, v in manifest["tensors"].items()}
        whole = {**manifest, "tensors": tensors, "files": files, "statistics": name}
        with self._told(step, MANIFEST):
            self._await_files(step, whole)
        part = f"{self.path(step)}/{MANIFEST}.part"
        with self._told(step, MANIFEST):
            if self.local:
                Path(part).write_text(json.dumps(whole))
                sync(part)
                os.replace(part, part.removesuffix(".part"))
                sync(self.path(step))
            else:
                self.fs.pipe_file(part, json.dumps(whole).encode())
                self.fs.mv(part, part.removesuffix(".part"))
        with suppress(OSError):  # what is left of an earlier one takes room, no more
            self._sweep(step)

    def _there(self) -> list[int]:
        """Steps of what has the name of a checkpoint, ascending."""
        self.fs.invalidate_cache()
        try:
            listing = self.fs.ls(self.root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [i["name"].rstrip("/").rpartition("/")[2] for i in listing if i["type"] != "file"]
        return sorted(int(n[5:]) for n in names if re.fullmatch(r"step-\d{6,}", n) and n == f"step-{int(n[5:]):06d}")

    def _inspect(self, step: int, before: int) -> Entry | None:
        """`before`: serial of the step before it, for a manifest that cannot tell its own."""
        try:
            manifest = self.manifest(step)
            serial = manifest.get("serial", 0)
            return Entry(step, serial if isinstance(serial, int) else 0, self.fault(step, manifest))
        except (FileNotFoundError, NotADirectoryError, OtherStep):
            return None
        except (OSError, ValueError) as e:
            return Entry(step, before, f"unreadable manifest: {e}")

    def _put_aside(self, step: int) -> None:
        """Move what is committed under this step and is no whole checkpoint of it: another step's, or damaged."""
        try:
            whole = not self.fault(step, self.manifest(step))
        except FileNotFoundError:
            return
        except ValueError:
            whole = False
        if not whole:
            self.fs.mv(self.path(step), f"{self.path(step)}.moved-{uuid.uuid4().hex[:8]}", recursive=True)

    def _sweep(self, step: int) -> None:
        """Remove our files that the manifest of this step, if there is one, does not name."""
        keep: set[str] = set()
        with suppress(FileNotFoundError):
            manifest = self.manifest(step)
            keep = {MANIFEST, *(n for n, _ in manifest["tensors"].values()), *manifest.get("files", {STATISTICS_FILE})}
        self._delete(step, [n for n in self._names(step) if n not in keep and (_NAME.fullmatch(n) or _is_cut(n))])

    def _remove(self, step: int) -> None:
        """The manifest first: a crash in between leaves no half checkpoint that looks whole."""
        named = {n for n, _ in self.manifest(step)["tensors"].values()}
        self.fs.rm_file(f"{self.path(step)}/{MANIFEST}")
        self._delete(step, [n for n in self._names(step) if n in named or _NAME.fullmatch(n) or _is_cut(n)])
        self._drop_empty(step)

    def _delete(self, step: int, names: list[str]) -> None:
        if names:
            self.fs.rm([f"{self.path(step)}/{n}" for n in names])

    def _drop_empty(self, step: int) -> None:
        if self.fs.isdir(self.path(step)) and not self._names(step):
            with suppress(OSError):
                os.rmdir(self.path(step)) if self.local else self.fs.rm(self.path(step), recursive=True)

    def _names(self, step: int) -> list[str]:
        self.fs.invalidate_cache()
        try:
            return [p.rstrip("/").rpartition("/")[2] for p in self.fs.ls(self.path(step), detail=False)]
        except FileNotFoundError:  # stores have no empty directories
            return []

    def _name(self, step: int, name: str) -> str:
        """A name that no file of a checkpoint of this step has that is there already: it stays whole until the end."""
        if not self.fs.exists(f"{self.path(step)}/{MANIFEST}"):
            return name
        stem, _, suffix = name.rpartition(".")
        return f"{stem}-{uuid.uuid4().hex[:8]}.{suffix}"

    def _sizes(self, step: int, names: Iterable[str]) -> dict[str, int]:
        """Sizes of those files that are there."""
        if self.local:  # one by one: a listing of a network file system may be a minute old
            paths = {n: Path(self.path(step), n) for n in names}
            return {n: p.stat().st_size for n, p in paths.items() if p.is_file()}
        self.fs.invalidate_cache()
        listing = self.fs.ls(self.path(step), detail=True)
        return {i["name"].rpartition("/")[2]: int(i["size"]) for i in listing if i["type"] == "file"}

    def _write(self, step: int, name: str, write: Callable[[str], None], size: int = 0) -> int:
        """One file, by `write(path)`: locally where it belongs, else through a temporary one. Returns its size."""
        target = f"{self.path(step)}/{name}"
        if self.local:
            with self._told(step, name, size):
                write(target)
                sync(target)
                return os.path.getsize(target)
        with self._told(step, name, size, where := temporary()):
            tmp = tempfile.TemporaryDirectory()
        with tmp:
            with self._told(step, name, size, where):
                write(f"{tmp.name}/{name}")
                written = os.path.getsize(f"{tmp.name}/{name}")
            with self._told(step, name, size):
                self.fs.put_file(f"{tmp.name}/{name}", target)
            return written

    def _await_files(self, step: int, manifest: dict[str, Any]) -> None:
        """Raises SaveError if what ranks wrote is not seen here: then nobody could read it either."""
        limit = time.monotonic() + APPEARS_S
        while fault := self.fault(step, manifest):
            if time.monotonic() > limit:
                raise SaveError(
                    f"checkpoint {self.url}/step-{step:06d} is not complete: {fault} although a rank wrote it; "
                    f"checkpoint.dir must be one place that all nodes share, or a URL{self._untouched(step)}"
                )
            time.sleep(0.2)

    @contextmanager
    def _told(self, step: int, what: str, size: int = 0, where: str = "") -> Iterator[None]:
        """Turns what goes wrong while saving into one sentence."""
        try:
            yield
        except SaveError:
            raise
        except Exception as e:
            if self.local and not isinstance(e, OSError):
                raise  # clients of stores raise nearly anything, a local file system does not
            place = where or f"{self.root if self.local else self.url}"
            what = f"{what}, {size / 1e6:,.1f} MB" if size else what
            raise SaveError(
                f"the checkpoint of step {step} could not be saved in {place}: {in_one_line(e)} (writing {what})"
                f"{self._untouched(step)}; {remedy(e, bool(where))}"
            ) from None

    def _untouched(self, step: int) -> str:
        with suppress(Exception):
            if whole := self.steps():
                return f"; the checkpoint of step {whole[-1]} is untouched"
        return ""


class OtherStep(ValueError):
    """A manifest that lies in the directory of another step than its own."""


def _plain(name: Any) -> bool:
    """Whether it is a name of a file, not a path."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def _is_cut(name: str) -> bool:
    return _CUT_SHORT.fullmatch(name) is not None
