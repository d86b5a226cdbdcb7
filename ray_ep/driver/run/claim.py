"""A run directory belongs to one process at a time: a lock that the kernel drops when that process ends, however.

The lock is on the file `.lock` in the directory; what is in the file tells people who holds it. No Ray.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_ep.errors import ConfigError

LOCK = ".lock"
"""Name of the file in a run directory that a living run keeps locked."""

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_PATIENCE_S = 0.5
"""Somebody who only asks whether a run is alive holds its lock for a moment."""


class Claim:
    """A directory that is this run's until `release`, or until the process is gone.

    Children do not inherit the lock: Python's descriptors are closed on exec.
    """

    def __init__(self, path: Path, now: datetime, new: bool = False, key: str = "run_dir"):
        """Take the directory that `key` names, made if it is not there; with `new` it must not be there yet.

        Raises:
            ConfigError: another process has it, or it cannot be written to. Nothing is left behind then.
            FileExistsError: it is there, and should not be.
        """
        self.path, self.began, self.locked, self._key = path, False, True, key
        self._made: list[Path] = []  # directories that this claim made, the outermost first
        self._before: bytes | None = None  # what was in the lock's file
        self._file = -1
        try:
            self._make(new)
            self._lock()
            self._write(now)
        except FileExistsError:
            self.release()
            if new:
                raise
            raise ConfigError(f"{key}={str(path)!r} is not a directory: give another {key}") from None
        except (OSError, ValueError) as e:
            self.release()
            reason = getattr(e, "strerror", None) or e
            raise ConfigError(f"{key}={str(path)!r}: cannot write there: {reason}; give another {key}") from None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the directory back; if the run never began, nothing of the claim is left. May be called twice."""
        if self._file >= 0:
            with suppress(OSError):
                if not self.began:
                    self._restore()
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # also for a copy that a forked child may hold
            os.close(self._file)
            self._file = -1
        if not self.began:
            for path in self._made[::-1]:
                with suppress(OSError):
                    path.rmdir()
        self._made = []

    def _make(self, new: bool) -> None:
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        for path in missing[::-1]:
            try:
                path.mkdir()
                self._made.append(path)
            except FileExistsError:  # made by another run meanwhile
                if (new and path == self.path) or not path.is_dir():
                    raise
        if new and not missing:
            raise FileExistsError(errno.EEXIST, "File exists")

    def _lock(self) -> None:
        file = self.path / LOCK
        limit = time.monotonic() + _PATIENCE_S
        while True:
            there = file.exists()
            self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if e.errno not in _BUSY:  # a file system without locks
                    self.locked = False
                    self._before = os.pread(self._file, 1 << 16, 0) if there else None
                    return
                os.close(self._file)
                self._file = -1
                if time.monotonic() > limit:
                    raise ConfigError(in_use(self.path, last_holder(self.path), self._key)) from None
                time.sleep(0.02)
                continue
            with suppress(FileNotFoundError):
                if os.fstat(self._file).st_ino == file.stat().st_ino:  # else a refused run has taken it away
                    self._before = os.pread(self._file, 1 << 16, 0) if there else None
                    return
            os.close(self._file)
            self._file = -1

    def _write(self, now: datetime) -> None:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now.isoformat(" ", "seconds")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(who).encode(), 0)
        os.fsync(self._file)  # a full disk is told here

    def _restore(self) -> None:
        if self._before is None:
            (self.path / LOCK).unlink()
        else:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, self._before, 0)


def holder(path: Path, unknown: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Who runs in `path`, as its lock's file tells: pid, host, since, or {} where it doesn't. None: nobody.

    `unknown` is the answer where the file system has no locks.
    """
    try:
        file = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as e:
        if e.errno not in _BUSY:
            return unknown
        return _who(os.pread(file, 1 << 16, 0))
    finally:
        os.close(file)


def last_holder(path: Path) -> dict[str, Any]:
    """Who has or had `path`, as far as its lock's file tells."""
    try:
        return _who((path / LOCK).read_bytes())
    except OSError:
        return {}


def _who(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def in_use(path: Path, who: dict[str, Any], key: str = "run_dir") -> str:
    """The sentence about a directory that another process has."""
    by = f"process {who['pid']} on host {who.get('host')} since {who.get('since')}" if "pid" in who else "another run"
    return f"{key}={str(path)!r} is in use by {by}: wait for its end, or give another {key}"
