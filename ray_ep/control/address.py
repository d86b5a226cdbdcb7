"""Where a run's control listens: the file that tells it, and what users write, RUN or HOST:PORT. No gRPC, no Ray."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray_ep.config.control import is_loopback
from ray_ep.control.keys import private, secret
from ray_ep.driver.run.claim import holder, last_holder
from ray_ep.errors import BadInput, ConfigError

FILE = "control.json"
"""Name of the file in a run directory, of mode 0600, that is there while the run's control listens."""


@dataclass(frozen=True, slots=True)
class Target:
    """How to reach a control.

    Args:
        address: HOST:PORT. host: name of the machine that it is on; "": not known. pid: of the driver; 0: not known.
        token: to show. tls: whether it speaks TLS.
        ca: PEM file to know its certificate by; "": those of the system.
        cert, key: PEM files to show, where it asks for a certificate; "": none.
        run: the run directory that told all this; "": somebody gave the address.
    """

    address: str
    token: str = field(repr=False)
    host: str = ""
    pid: int = 0
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    run: str = ""

    def said(self) -> str:
        """For a sentence."""
        return f"{self.run!r} ({self.address})" if self.run else self.address


def write(run: Path, target: Target) -> None:
    """Tell whoever may read this user's files where the run's control listens. Raises OSError."""
    part = run / f".{FILE}.{os.getpid()}"
    with suppress(FileNotFoundError):
        part.unlink()
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        tree = {k: v for k, v in asdict(target).items() if k not in ("run", "cert", "key")}
        os.write(file, json.dumps(tree, indent=1).encode())
    finally:
        os.close(file)
    os.replace(part, run / FILE)


def remove(run: Path) -> None:
    """It listens no more."""
    with suppress(OSError):
        (run / FILE).unlink()


def target_of(where: str, token_file: str = "", ca: str = "", cert: str = "", key: str = "") -> Target:
    """Of a run directory, or of HOST:PORT with the token in `token_file`.

    Args:
        ca, cert, key: as of Target; with an address, any of them means TLS, and so does another machine's address: a
            token never travels in the open.

    Raises:
        BadInput: neither, no right to read the file there, or a run that has ended.
    """
    given: dict[str, Any] = {k: v for k, v in (("ca", ca), ("cert", cert), ("key", key)) if v}
    if is_run(where) or not re.fullmatch(r"[^/\s]+:\d{1,5}", where):
        told = _of_run(where)
        given |= {"token": secret(token_file, "--token-file")} if token_file else {}
        return Target(**(told | given))
    if not token_file:
        raise BadInput(f"{where}: give --token-file FILE, too: without a token nobody is let in")
    return Target(where, secret(token_file, "--token-file"), tls=bool(given) or not is_loopback(_host(where)), **given)


def is_run(where: str) -> bool:
    """Whether that is a directory here, and no address."""
    try:
        return Path(where).is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _of_run(where: str) -> dict[str, Any]:
    """The file of a living run."""
    run = Path(where)
    if not is_run(where) or not (run / "config.yaml").is_file():
        if is_run(where) and holder(run) is not None:
            raise BadInput(f"{where!r}: this run is forming still: its control listens when its ranks are ready")
        raise BadInput(f"{where!r}: expected a run directory, with its config.yaml, or HOST:PORT of a run's control")
    who = holder(run, unknown={})
    if who is None:
        raise BadInput(ended(run))
    none = BadInput(
        f"{where!r}: this run has no control: it is forming still, or ending, or control.enabled=false, or its event "
        "`control` says why"
    )
    try:
        tree = json.loads(private(str(run / FILE), "control"))
        told = {name: tree[name] for name in ("address", "token", "host", "pid", "tls", "ca")}
    except ConfigError as e:
        raise (BadInput(str(e)) if (run / FILE).exists() else none) from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{str(run / FILE)!r} is damaged: give HOST:PORT and --token-file instead") from None
    if who.get("pid", told["pid"]) != told["pid"]:  # left by a driver that was killed
        raise none
    host, here = str(told["host"]), socket.gethostname()
    if host != here and is_loopback(_host(str(told["address"]))):
        raise BadInput(
            f"{str(run)!r}: its control listens on host {host} for that host alone: ask there, or start the run with "
            "control.address and TLS"
        )
    return {**told, "run": str(run)}


def _host(address: str) -> str:
    """Of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def ended(run: Path) -> str:
    """The sentence about a run that is over, with the command that goes on."""
    who = last_holder(run)
    by = f" (it was process {who['pid']} on host {who.get('host')})" if "pid" in who else ""
    command = shlex.join(["ray-ep", "train", f"run_dir={run}", "resume=auto"])
    page = f"; what it did is in {run}/report.html" if (run / "report.html").is_file() else ""
    return f"{str(run)!r}: this run has ended{by}: nobody is there to ask{page}; to go on with it: {command}"
