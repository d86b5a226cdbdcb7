"""The Ray cluster of a run: started or joined, and left."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.job_config import JobConfig

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.joining import check_head, check_temporary, refusal
from ray_ep.driver.actors.shown import NOT_SHOWN, Shown
from ray_ep.errors import ClusterError

SLICE_S = 0.2
"""Seconds of one wait, after which signals are looked at; one whose answer is there returns at once."""
_KILL_MS = 500
"""How long a local Ray lets a process that it kills end by itself: a stopped one cannot, and Ray's own 5 s are long."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The Ray that a run uses: whether it was started for it, and what an operator should read of it.

    Args:
        page: of the run in Ray's dashboard; "": it is not there.
    """

    local: bool
    words: str
    page: str = ""


def starting(cfg: ClusterConfig) -> str:
    """What `connected` is about to do, in words."""
    return "starting Ray" if starts(cfg) else "joining the cluster"


def starts(cfg: ClusterConfig) -> bool:
    """Whether `connected` starts a Ray of this machine alone."""
    return not ray.is_initialized() and _address(cfg) in ("", "local")


def _address(cfg: ClusterConfig) -> str:
    return cfg.address or os.environ.get("RAY_ADDRESS", "")


@contextmanager
def connected(cfg: ClusterConfig, interrupted: Callable[[], bool] = bool, shown: Shown = NOT_SHOWN) -> Iterator[Joined]:
    """Join the cluster that cfg or RAY_ADDRESS names, else start a local Ray, whatever else runs on the machine.

    Args:
        interrupted: asked while Ray starts, which is not broken off: half a cluster would be left behind.
        shown: what the job's metadata say, and what the dashboard of a local Ray asks first.

    Raises:
        ClusterError: no cluster answers at the address, or Ray cannot start; the message names key or variable.
    """
    if ray.is_initialized():
        yield Joined(False, f"the Ray of this process at {_gcs()}")
        return
    source = "cluster.address" if cfg.address else "RAY_ADDRESS"
    address = _address(cfg)
    local = address in ("", "local")
    if local:
        check_temporary(os.environ)
    else:
        check_head(address, f"{source}={address!r}", os.environ)
    options: dict[str, Any] = {"job_config": JobConfig(metadata=shown.metadata())}
    if local:
        options |= {"include_dashboard": cfg.dashboard, "proxy_server_url": shown.proxy or None}
        options |= {"_system_config": {"kill_worker_timeout_milliseconds": _KILL_MS}}
    logging.getLogger("ray").setLevel(logging.ERROR)
    options |= {"logging_level": "ERROR", "log_to_driver": False}
    started = _started("local" if local else address, options)
    while not started.done():
        with suppress(KeyboardInterrupt):
            interrupted()
        wait([started], SLICE_S)
    e = started.exception()
    if isinstance(e, Exception):  # of any kind: that it timed out Ray tells as a plain one
        raise ClusterError(refusal(e, "" if local else f"{source}={address!r}", os.environ)) from None
    started.result()
    try:
        yield Joined(local, "a local Ray of its own" if local else f"the cluster at {_gcs()} ({source})")
    finally:
        ray.shutdown()


def _started(address: str, options: dict[str, Any]) -> Future[None]:
    """`ray.init` in a thread: on the main one Ray takes SIGTERM over and leaves half a cluster behind when it comes.

    The thread lives as long as the process does, for Ray's processes die with the thread that started them.
    """
    started: Future[None] = Future()

    def start() -> None:
        try:
            ray.init(address=address, **options)
            started.set_result(None)
        except BaseException as e:
            started.set_exception(e)
        threading.Event().wait()

    threading.Thread(target=start, name="ray-init", daemon=True).start()  # a second signal does not wait for it
    return started


def _gcs() -> str:
    return str(ray.get_runtime_context().gcs_address)


@dataclass(frozen=True, slots=True)
class Device:
    """What ranks compute on: cpu or cuda, and what an operator should know of the choice; "": nothing."""

    kind: str
    note: str = ""


def device_of(cfg: ClusterConfig, resources: dict[str, float], built: bool, local: bool) -> Device:
    """What the ranks compute on, given what the cluster has in all (`ray.cluster_resources()`).

    Args:
        built: torch was built for CUDA (`torch.backends.cuda.is_built()`), here and so on the ranks' nodes.
        local: it is a Ray of this machine alone. One that was joined may grow: there the placement waits for GPUs.

    Raises:
        ClusterError: cuda is asked for, and a local Ray has fewer GPUs than ranks or torch cannot use any.
    """
    have = int(resources.get("GPU", 0))
    if cfg.device == "cuda" and have < cfg.ranks and local:
        raise ClusterError(
            f"cluster.device=cuda: {cfg.ranks} ranks need {cfg.ranks} GPUs, the cluster has {have} (and "
            f"{resources.get('CPU', 0.0):g} CPUs): lower cluster.ranks, or cluster.device=cpu"
        )
    if cfg.device == "cpu" or (cfg.device == "auto" and not have):
        return Device("cpu")
    why = "torch was built without CUDA: install torch's build for CUDA on every node"
    if built:
        if have >= cfg.ranks or cfg.device == "cuda":
            return Device("cuda")
        why = f"{cfg.ranks} ranks need {cfg.ranks}: cluster.ranks={have} takes them"
    elif cfg.device == "cuda":
        raise ClusterError(f"cluster.device=cuda: {why}; or cluster.device=cpu")
    return Device("cpu", f"ranks compute on CPUs: GPUs in the cluster: {have}, but {why} (cluster.device=cpu: no GPUs)")


def transports(wanted: str, device: str, usable: list[list[str]]) -> list[str]:
    """Transports to choose from for ranks on `device`, given exchange.transport and what each rank could use.

    DeepEP's kernels go over torch's NCCL: that is the transport then.

    Raises:
        ClusterError: none is left.
    """
    if wanted in ("nccl", "torch_nccl", "deepep") and device == "cpu":
        raise ClusterError(
            f"exchange.transport={wanted} moves tensors between GPUs, and these ranks compute on CPUs: allowed are "
            "auto, gloo (cluster.device=cuda says what is missing for GPUs)"
        )
    if wanted == "deepep":
        if not all("deepep" in names for names in usable):
            raise ClusterError(
                f"exchange.transport=deepep: not every rank has deep_ep and torch's NCCL ({_usable_by(usable)}); "
                "deep_ep is built from source: see docs/notes/deepep.md"
            )
        return ["torch_nccl"]
    if wanted != "auto":
        return [wanted]
    if device == "cpu":
        return ["gloo"]
    found = [t for t in ("nccl", "torch_nccl") if all(t in names for names in usable)]
    if not found:
        raise ClusterError(
            f"exchange.transport=auto: no NCCL can be used by every rank ({_usable_by(usable)}): install ray_ep's "
            "extra cuda12 or cuda13, or exchange.transport=gloo"
        )
    return found


def _usable_by(usable: list[list[str]]) -> str:
    """Which ranks can use what, in words."""
    ranks: dict[str, list[int]] = {}
    for rank, names in enumerate(usable):
        ranks.setdefault(", ".join(names), []).append(rank)
    return "; ".join(f"rank {of[0]}{' and others' * (len(of) > 1)}: {names}" for names, of in ranks.items())
