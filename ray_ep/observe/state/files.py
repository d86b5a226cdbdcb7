"""Files of a run directory as somebody reads them who did not write them: what is missing, cut or damaged is left out.

Each reader looks again only at what has changed since. Imports NumPy, PyYAML and the placement's own formats.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import yaml

from ray_ep.errors import PlacementError
from ray_ep.placement.topology import Topology

T = TypeVar("T")
Mark = tuple[int, int, int]
"""What tells one content of a file from another: its inode, its size and when it was written."""

_CHUNK = 1 << 24  # bytes read at once: a file of a long run need not fit into memory
_VALUE = r"""("[^"\n]*"|'[^'\n]*'|[^\s&'"]+)"""
_SECRET = r"token|secret\w*|password|signature|api_?key"
_SECRETS = (
    (re.compile(r"(://)[^/@\s]+@"), r"\1***@"),  # user:password@host
    (re.compile(rf"(?i)((?:{_SECRET})\s*[=:] *)" + _VALUE), r"\1***"),
)
_SECRET_KEY = re.compile(rf"(?i)\w*(?:{_SECRET})")


class Lines:
    """A .jsonl file that grows: whole lines since the last look."""

    def __init__(self, path: Path):
        self.path, self._inode, self._at = path, 0, 0

    def news(self) -> Iterator[tuple[bool, list[bytes]]]:
        """Some lines after others, without their ends; with each whether the file has begun anew before them.

        A line that has no end yet is left for later, so that nobody reads half of it.
        """
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                anew = self._at > 0 and (state.st_ino != self._inode or state.st_size < self._at)
                self._inode, self._at = state.st_ino, 0 if anew else self._at
                if anew:
                    yield True, []
                while (lines := self._some(file)) is not None:
                    yield False, lines
        except OSError:
            return

    def _some(self, file: Any) -> list[bytes] | None:
        file.seek(self._at)
        chunk: bytes = b""
        more: bytes = file.read(_CHUNK)
        while more and b"\n" not in more:  # one line that is longer than a chunk
            chunk, more = chunk + more, file.read(_CHUNK)
        end = more.rfind(b"\n") + 1
        if not end:
            return None
        chunk += more[:end]
        self._at += len(chunk)
        return list(chunk[:-1].split(b"\n"))


class Whole(Generic[T]):
    """A file that is replaced whole: its content as `read` understands it, read again when it is another."""

    def __init__(self, path: Path, read: Callable[[Path], T]):
        self.path, self._read = path, read
        self._mark: Mark | None = None
        self.value = read(path)

    def changed(self) -> bool:
        """Look again; whether it is another file than before."""
        mark = mark_of(self.path)
        if mark == self._mark:
            return False
        self._mark, self.value = mark, self._read(self.path)
        return True


def mark_of(path: Path) -> Mark | None:
    """What tells this content of a file from another; None: it is not there."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def objects(lines: list[bytes]) -> list[dict[str, Any]]:
    """The JSON objects among lines."""
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [o for o in found if isinstance(o, dict)]


def read_config(path: Path) -> dict[str, Any]:
    """The configuration; {}: none that can be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def read_exchange(path: Path) -> dict[str, Any]:
    """How tokens travel: words, and timings of kind, transport, seconds and rounds, the fastest first; {}: not known.

    With each timing `taken`: whether it is the way that was chosen.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        words = str(tree["words"])
        rows = [(str(t["kind"]), str(t["transport"]), float(t["seconds"]), int(t["rounds"])) for t in tree["timings"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return {}
    names = ("kind", "transport", "seconds", "rounds")
    taken = (str(tree.get("kind")), str(tree.get("transport")))
    timings = [dict(zip(names, row, strict=True), taken=row[:2] == taken) for row in sorted(rows, key=lambda r: r[2])]
    return {"words": words, "timings": timings}


def read_topology(path: Path) -> Topology | None:
    """The links; None: not known."""
    try:
        return Topology.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, PlacementError):
        return None


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays of an .npz that can be read, float64."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for name in names:
                if name in file.files:
                    arrays[name] = file[name].astype(np.float64)
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}
    return arrays


def masked(text: str) -> str:
    """`text` without the passwords and tokens that addresses and settings may carry."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def masked_tree(tree: Any, key: str = "") -> Any:
    """A tree as JSON has it, without secrets: those of its texts, and values whose key says that they are one."""
    if isinstance(tree, dict):
        return {str(name): masked_tree(item, str(name)) for name, item in tree.items()}
    if isinstance(tree, list):
        return [masked_tree(item, key) for item in tree]
    if isinstance(tree, float) and not np.isfinite(tree):
        return None
    if not isinstance(tree, str):
        return tree if isinstance(tree, (int, float)) or tree is None else str(tree)
    return "***" if tree and _SECRET_KEY.fullmatch(key) else masked(tree)


def number(value: object) -> float:
    """A figure of a file as a float; NaN: it is none."""
    try:
        return float(value) if isinstance(value, (int, float)) else float("nan")
    except OverflowError:  # an integer of hundreds of digits
        return float("nan")


def whole(value: object) -> int | None:
    """A whole number of a file, as far as floats tell them apart; None: it is none."""
    figure = number(value)
    return int(figure) if abs(figure) < 1e15 else None


def plain(values: np.ndarray) -> Any:
    """An array as nested lists that JSON can hold: what is not finite becomes None."""
    if np.isfinite(values).all():
        return values.tolist()
    out = values.astype(object)
    out[~np.isfinite(values)] = None
    return out.tolist()
