"""What other processes ask of a run, as files in its directory: each request is one, taken once, oldest first. No Ray.

A file `rebalance` in the directory, also an empty one made by hand, asks for a decision about the placement.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from ray_ep.driver.requests import Request, RequestKind

REQUESTS = "requests"
"""Directory in a run directory that holds what was asked and not yet taken."""

log = logging.getLogger("ray_ep.driver")


def ask(path: Path, request: Request) -> None:
    """Leave a request in the run directory `path`; none replaces another one. Raises OSError."""
    folder = path / REQUESTS
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns():020d}-{os.getpid()}-{request.kind.value}"
    part = folder / f".{name}"
    try:
        tree = {"kind": request.kind.value, "by": request.by, "fields": dict(request.fields)}
        part.write_text(json.dumps(tree), encoding="utf-8")
        part.replace(folder / f"{name}.json")  # nobody reads half of it
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def take(path: Path) -> Request | None:
    """The oldest request in the run directory `path`, which is gone then; None: there is none."""
    if _taken(path / RequestKind.REBALANCE.value) is not None:
        return Request(RequestKind.REBALANCE, f"the file {RequestKind.REBALANCE.value}")
    with suppress(OSError):
        for name in sorted(n for n in os.listdir(path / REQUESTS) if n.endswith(".json")):
            if (said := _taken(path / REQUESTS / name)) is None:
                continue
            with suppress(ValueError, TypeError, KeyError):
                tree = json.loads(said)
                return Request(RequestKind(tree["kind"]), str(tree["by"]), dict(tree["fields"]))
            log.warning("request file=%s: not understood", name)
    return None


def _taken(file: Path) -> bytes | None:
    """What is in a file that is gone then; None: it is not there, or cannot be taken away."""
    try:
        said = file.read_bytes()
        file.unlink()
    except OSError:
        return None
    return said
