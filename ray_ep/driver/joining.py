"""Why Ray could not be started or joined, in one line that names the key or variable. Starts nothing."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Mapping

import ray

NONE = "give the address that `ray start --head` printed (port 6379 by default), or none, to start a local Ray"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What every gRPC client says first: HTTP/2's preface and an empty SETTINGS frame (RFC 9113, 3.4)."""


def is_ray(link: socket.socket, limit_s: float = 10.0) -> bool:
    """Whether a gRPC server, such as a Ray cluster, is at the other end of a new connection."""
    link.settimeout(limit_s)
    try:
        link.sendall(_PREFACE)
        head = b""
        while len(head) < 4 and (more := link.recv(9)):
            head += more
    except OSError:
        return False
    return head[3:4] == b"\x04"  # a server answers with its own SETTINGS


def refusal(e: Exception, address: str, environ: Mapping[str, str]) -> str:
    """What was wrong when `ray.init` raised `e`, and what to do.

    Args:
        address: as the user gave it, with the key or variable; empty: a local Ray was to be started.
        environ: the environment, of which what Ray reads is named.
    """
    text = str(e).strip()
    first = re.sub(r"\s+", " ", text)[:300] or type(e).__name__
    if "ersion mismatch" in text:
        return f"{address}: {_versions(text)}"
    if re.search(r"uthenticat|[Uu]nauthorized|auth token|\btoken\b", text):
        return (
            f"{address or 'a local Ray'}: the cluster does not take this client's token: give the cluster's own in "
            "RAY_AUTH_TOKEN (or a file that RAY_AUTH_TOKEN_PATH names) with RAY_AUTH_MODE=token; if the cluster was "
            f"started without tokens, RAY_AUTH_MODE=disabled (now RAY_AUTH_MODE={environ.get('RAY_AUTH_MODE', '')!r})"
        )
    if address:
        return f"{address}: no Ray cluster answers there: {first}: {NONE}"
    if isinstance(e, OSError):
        return _directory(e, first, environ)
    return f"a local Ray could not be started: {first}"


def _directory(e: OSError, first: str, environ: Mapping[str, str]) -> str:
    """Ray's temporary directory is at fault: sockets, logs and, where /dev/shm is small, objects lie in it."""
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in environ), "")
    named = f"{name}={environ[name]}" if name else "/tmp"
    if "AF_UNIX" in str(e):
        return (
            f"{named} is too long for Ray's sockets, whose whole path may have 107 characters: set RAY_TMPDIR to a "
            "directory with a path of at most 40"
        )
    what = e.strerror or first
    return f"{named} cannot be Ray's temporary directory: {what}: set RAY_TMPDIR to a directory one can write to"


def _versions(text: str) -> str:
    """Ray's own words span ten lines; the cluster's versions come first in them, this process's second."""
    rays, pythons = (re.findall(rf"{word}: *([\w.+]+)", text) for word in ("Ray", "Python"))
    there = f"Ray {rays[0]} and Python {pythons[0]}" if rays and pythons else "another Ray or Python"
    return (
        f"the cluster runs {there}, this process Ray {ray.__version__} and Python {platform.python_version()}: they "
        "must be the same: install ray_ep in the cluster's environment, or use that environment here"
    )
