"""Ray on a lab: a node a host, and commands that join the cluster. Imports lab and network; calls `ray`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import BAD_INPUT, SWITCH, Host, Lab, LabError
from network import call, end_processes, is_up, make_network, remove

PORT = 6379
RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",  # nobody outside the lab reaches it
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own verdict on a host that was cut: after 4 to 6 s instead of 63 s.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def environment(lab: Lab) -> dict[str, str]:
    """That of Ray and of commands: the lab's cluster, and this Python's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    address = f"{lab.address(lab.head.name)}:{PORT}"
    return {**os.environ, **RAY_ENV, "PATH": path, "NETLAB": lab.name, "RAY_ADDRESS": address}


def start_ray(lab: Lab, host: Host) -> None:
    """Start a host's Ray node; returns once it is a member.

    Raises:
        LabError: it did not start; with its own last words.
    """
    address = lab.address(host.name)
    head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    role = head if host == lab.head else [f"--address={lab.address(lab.head.name)}:{PORT}"]
    told = [f"--num-cpus={host.cpus}", "--num-gpus=0", f"--object-store-memory={lab.object_store_mb * 10**6}"]
    own = [f"--node-ip-address={address}", f"--temp-dir={lab.folder / host.name}", "--disable-usage-stats"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *told, *own]
    env = {k: v for k, v in environment(lab).items() if k != "RAY_ADDRESS"}
    log = lab.folder / f"{host.name}.start.log"
    command = ["ip", "netns", "exec", lab.namespace(host.name), *ray]
    with open(log, "w") as out:  # a file: daemons would keep a pipe open. A new session: no Ctrl-C for Ray
        try:
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, timeout=180
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"host {host.name}: Ray did not start within 180 s: {log.read_text()[-1000:]}") from None
    if done.returncode:
        raise LabError(f"host {host.name}: Ray did not start: {log.read_text()[-1000:]}")


def start_again(lab: Lab, name: str) -> None:
    """Start Ray again on a host whose node was lost, once nothing runs there any more.

    Raises:
        LabError: no such host, or the head's, or Ray did not start.
    """
    host = next((h for h in lab.hosts if h.name == name and h != lab.head), None)
    if host is None:
        others = ", ".join(h.name for h in lab.hosts[1:])
        raise LabError(f"start {name}: the first host's Ray is the cluster; allowed: {others}", BAD_INPUT)
    end_processes(lab.namespace(name))
    start_ray(lab, host)


def run_command(lab: Lab, host: str, command: list[str]) -> int:
    """Run a command in a host's namespace, on the lab's cluster; its exit status, as a shell would say it."""
    inside = ["ip", "netns", "exec", lab.namespace(host), *command]
    # The terminal's Ctrl-C reaches the command too, and it says when it is done; a SIGTERM for us is passed on.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen(inside, env=environment(lab))
    term = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)
    return status if status >= 0 else 128 - status


def up(lab: Lab, ray: bool = True) -> None:
    """Bring a lab up, with Ray or with hosts and links only; on any failure nothing of it is left.

    Raises:
        LabError: it is up already, or a step failed.
    """
    try:
        call("ip", "netns", "add", lab.namespace(SWITCH))  # first: of two at once only one passes here
    except LabError:
        if is_up(lab):
            raise LabError(f"lab {lab.name} is up already: use `exec`, or take it `down` first") from None
        raise
    try:
        remove(lab, switch=False)  # what a teardown that was broken off left
        shutil.rmtree(lab.folder, ignore_errors=True)
        lab.folder.mkdir(mode=0o700)
        make_network(lab)
        if ray:
            start_ray(lab, lab.head)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda host: start_ray(lab, host), lab.hosts[1:]))
    except BaseException:
        remove(lab)
        raise


@contextlib.contextmanager
def running(lab: Lab, keep: bool, ray: bool = True) -> Iterator[None]:
    """The lab, up; taken down at the end unless it is to be kept."""
    up(lab, ray)
    try:
        yield
    finally:
        if not keep:
            remove(lab)
