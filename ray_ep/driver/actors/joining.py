"""Why Ray could not be started or joined, in one line that names the key or variable. Starts nothing.

Uses one private function of Ray, its gRPC channel with the client's token and TLS: pyproject pins the version range.
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress

import ray
from ray._private.grpc_utils import init_grpc_channel

from ray_ep.errors import ClusterError

NONE = "give the address that `ray start --head` printed (port 6379 by default), or none, to start a local Ray"
"""End of the refusal of an address where no Ray answers: what to do."""

_LEAST = 2_000_000
"""Bytes that a local Ray's logs take in a short run, with some to spare."""


def check_head(address: str, named: str, environ: Mapping[str, str], limit_s: float = 10.0) -> None:
    """Ask HOST:PORT for the id of its cluster: where no head of Ray answers, `ray.init` would try for minutes.

    Args:
        named: the key or variable with the address, for the message.

    Raises:
        ClusterError: nothing listens there, something else does, or it refuses this client's token.
    """
    client = address.startswith("ray://")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s).close()
    except (OSError, OverflowError) as e:
        raise ClusterError(f"{named}: no Ray cluster answers there: {e}: {NONE}") from None
    if client:
        return
    try:
        with init_grpc_channel(address) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=limit_s)
    except Exception as e:  # grpc's, which tells its code; or Ray's of a token that cannot be read
        code = e.code().name if hasattr(e, "code") else ""
        if code == "UNAUTHENTICATED" or not code:
            raise ClusterError(_token(named, environ)) from None
        what = "another part of Ray than its head listens there" if code == "UNIMPLEMENTED" else "no Ray listens there"
        raise ClusterError(f"{named}: {what}: {NONE}") from None


def check_temporary(environ: Mapping[str, str]) -> None:
    """Whether a local Ray has room for logs: where it has none its processes die one by one, with other reasons.

    Raises:
        ClusterError: it has not.
    """
    named, where = _temporary(environ)
    with suppress(OSError):  # Ray meets it again
        free = shutil.disk_usage(where).free
        if free < _LEAST:
            raise ClusterError(
                f"{named} has {free / 1e6:.1f} MB free: Ray's logs and sockets are there, and need {_LEAST / 1e6:.0f} "
                "MB: make room there, or set RAY_TMPDIR to another directory"
            )


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
        return _token(address or "a local Ray", environ)
    if address:
        return f"{address}: no Ray cluster answers there: {first}: {NONE}"
    if isinstance(e, OSError):
        return _directory(e, first, environ)
    return f"a local Ray could not be started: {first}"


def _token(named: str, environ: Mapping[str, str]) -> str:
    mode = environ.get("RAY_AUTH_MODE", "")
    return (
        f"{named}: this client's token is missing or not the cluster's (RAY_AUTH_MODE={mode!r} here): set "
        "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names "
        "(~/.ray/auth_token by default); for a cluster without tokens: RAY_AUTH_MODE=disabled"
    )


def _directory(e: OSError, first: str, environ: Mapping[str, str]) -> str:
    """Ray's temporary directory is at fault: sockets, logs and, where /dev/shm is small, objects lie in it."""
    named, _ = _temporary(environ)
    if "AF_UNIX" in str(e):
        return (
            f"{named} is too long for Ray's sockets, whose whole path may have 107 characters: set RAY_TMPDIR to a "
            "directory with a path of at most 40"
        )
    what = e.strerror or first
    return f"{named} cannot be Ray's temporary directory: {what}: set RAY_TMPDIR to a directory one can write to"


def _temporary(environ: Mapping[str, str]) -> tuple[str, str]:
    """(what the user set, the directory) for what Ray writes."""
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in environ), "")
    return (f"{name}={environ[name]}", environ[name]) if name else ("/tmp", "/tmp")


def _versions(text: str) -> str:
    """Ray's own words span ten lines; the cluster's versions come first in them, this process's second."""
    rays, pythons = (re.findall(rf"{word}: *([\w.+]+)", text) for word in ("Ray", "Python"))
    there = f"Ray {rays[0]} and Python {pythons[0]}" if rays and pythons else "another Ray or Python"
    return (
        f"the cluster runs {there}, this process Ray {ray.__version__} and Python {platform.python_version()}: they "
        "must be the same: install ray_ep in the cluster's environment, or use that environment here"
    )
