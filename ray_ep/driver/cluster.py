"""The Ray cluster of a run: started or joined, checked for room, ranks placed on it and taken away again."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ep.config.process import RANK
from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.cause import for_memory, lost_peer, root_cause
from ray_ep.driver.joining import check_head, check_temporary, refusal
from ray_ep.errors import ClusterError, RankError, SaveError
from ray_ep.placement import Topology
from ray_ep.rank.actor import RankActor
from ray_ep.rank.memory import oom_kills

_ROOT_CAUSE_S = 2.0
"""How long to wait for other ranks' words after one failed with a lost peer: the peer's own traceback says why."""

_SLICE_S = 0.2
"""How long a wait lasts before signals are looked at; one whose answer is there returns at once."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The Ray that a run uses: whether it was started for it, and what an operator should read of it."""

    local: bool
    words: str


def starting(cfg: ClusterConfig) -> str:
    """What `connected` is about to do, in words."""
    return "starting Ray" if _address(cfg) in ("", "local") else "joining the cluster"


def _address(cfg: ClusterConfig) -> str:
    return cfg.address or os.environ.get("RAY_ADDRESS", "")


@contextmanager
def connected(cfg: ClusterConfig, interrupted: Callable[[], bool] = bool) -> Iterator[Joined]:
    """Join the cluster that cfg or RAY_ADDRESS names, else start a local Ray, whatever else runs on the machine.

    Args:
        interrupted: asked while Ray starts, which is not broken off: half a cluster would be left behind.

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
    options: dict[str, Any] = {"include_dashboard": cfg.dashboard} if local else {}
    logging.getLogger("ray").setLevel(logging.ERROR)
    options |= {"logging_level": "ERROR", "log_to_driver": False}
    started = _started("local" if local else address, options)
    while not started.done():
        with suppress(KeyboardInterrupt):
            interrupted()
        wait([started], _SLICE_S)
    e = started.exception()
    if isinstance(e, (OSError, RuntimeError, ValueError, RayError)):
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


class Ranks:
    """The rank actors of one epoch."""

    def __init__(self, cfg: ClusterConfig, name: str, local: bool, interrupted: Callable[[], bool]):
        """Place one actor a rank.

        Args:
            interrupted: asked every moment of every wait; may raise KeyboardInterrupt to leave it.

        Raises:
            ClusterError: the cluster has no room for them; the message says what it has.
        """
        self.cfg, self.name, self._interrupted = cfg, name, interrupted
        self.where: list[dict[str, Any]] = []
        self.device = device_of(cfg, ray.cluster_resources())
        _check_room(cfg, local)
        gpus = int(self.device == "cuda")
        bundles = [{"CPU": float(cfg.cpus_per_rank)} | ({"GPU": 1.0} if gpus else {})] * cfg.ranks
        self._group = placement_group(bundles, strategy="PACK", name=name)
        self.actors: list[Any] = []
        try:
            self._await_room()
            for rank, bundle in enumerate(_by_host(self._group)):
                strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
                options = {
                    "num_cpus": cfg.cpus_per_rank,
                    "num_gpus": gpus,
                    "runtime_env": {"env_vars": _environment()},
                    "scheduling_strategy": strategy,
                    "name": f"{name}-rank-{rank}",
                }
                threads = max(1, int(cfg.cpus_per_rank))
                self.actors.append(RankActor.options(**options).remote(rank, cfg.ranks, threads, self.device))
            self.where = self.call("where")
        except BaseException:
            self.kill()
            raise

    def topology(self) -> Topology:
        """Who shares a node, as Ray says."""
        nodes = list(dict.fromkeys(w["node"] for w in self.where))
        return Topology.of_nodes([nodes.index(w["node"]) for w in self.where])

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method on all ranks; results in rank order.

        Raises:
            RankError: a rank raised or died, with its own traceback; the other ranks are released first.
            BadInput, DivergedError: a rank found the user's input wrong, or values that are not finite.
            SaveError: a rank could not write; all have answered.
        """
        calls = {getattr(a, method).remote(*args): r for r, a in enumerate(self.actors)}
        results: list[Any] = [None] * len(self.actors)
        pending, failed = list(calls), {}
        limit = None
        while pending:
            self._interrupted()
            left = _SLICE_S if limit is None else limit - time.monotonic()
            if left <= 0:
                break
            done, pending = ray.wait(pending, num_returns=1, timeout=min(left, _SLICE_S))
            if not done:
                continue
            try:
                results[calls[done[0]]] = ray.get(done[0])
            except Exception as e:
                failed[calls[done[0]]] = e
                if isinstance(e, SaveError):  # not collective: the others end by themselves
                    continue
                limit = limit or time.monotonic() + _ROOT_CAUSE_S
                if not lost_peer(e):
                    break
        if failed:
            raise self._explained(root_cause(failed, [calls[c] for c in pending], self.where))
        return results

    def stop(self) -> None:
        """Ask all ranks, which may be computing, to leave an evaluation or a step of several passes early."""
        for actor in self.actors:
            actor.stop.remote()

    def _explained(self, cause: Exception) -> Exception:
        """Of a rank that is dead: whether the kernel killed processes of its node for memory meanwhile."""
        if not (isinstance(cause, RankError) and isinstance(cause.__cause__, RayActorError) and self.where):
            return cause
        lost = self.where[cause.rank]
        there = [r for r, w in enumerate(self.where) if w["node"] == lost["node"] and r != cause.rank]
        killed = 0
        with suppress(RayError):
            if there:
                killed = ray.get(self.actors[there[0]].oom_kills.remote(), timeout=2) - lost["oom_kills"]
            elif lost["node"] == ray.get_runtime_context().get_node_id():
                killed = oom_kills() - lost["oom_kills"]
        return for_memory(cause, lost["host"], killed) if killed > 0 else cause

    def share(self, value: Any) -> Any:
        """Put a value where every rank of a node reads the same copy."""
        return ray.put(value)

    def kill(self) -> None:
        """Stop every rank and give its place back; returns once they are gone."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        for actor in self.actors:
            _await_gone(actor)
        self.actors = []
        remove_placement_group(self._group)

    def _await_room(self) -> None:
        limit = time.monotonic() + self.cfg.wait_s
        while not self._group.wait(_SLICE_S):
            if self._interrupted():
                raise KeyboardInterrupt
            if time.monotonic() > limit:
                each = f"{self.cfg.cpus_per_rank:g} CPUs{' and a GPU' if self.device == 'cuda' else ''}"
                raise ClusterError(
                    f"the cluster could not place {self.cfg.ranks} ranks of {each} within "
                    f"cluster.wait_s={self.cfg.wait_s:g} s; it has {_have()}, free now: {_free()}"
                )


def _by_host(group: PlacementGroup) -> list[int]:
    """Numbers of a placed group's bundles by the address of their node: Ray's order differs from run to run.

    So a placement or a topology of one run fits the next one on the same hosts.
    """
    address = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]

    def place(bundle: int) -> tuple[int, str, int]:
        host = address[node_of[bundle]]
        try:
            return int(ip_address(host)), node_of[bundle], bundle
        except ValueError:  # a name
            return 0, host, bundle

    return sorted(node_of, key=place)


def _check_room(cfg: ClusterConfig, local: bool) -> None:
    """Refuse at once what no waiting can give: more CPUs than a local Ray has."""
    need, have = cfg.ranks * cfg.cpus_per_rank, ray.cluster_resources().get("CPU", 0.0)
    if need > have and local:  # a cluster that was joined may grow: there the placement waits
        raise ClusterError(
            f"cluster.ranks={cfg.ranks} of {cfg.cpus_per_rank:g} CPUs need {need:g} CPUs; this machine has {have:g}: "
            "lower cluster.ranks or cluster.cpus_per_rank (fractions such as 0.5 are allowed)"
        )


def device_of(cfg: ClusterConfig, resources: dict[str, float]) -> str:
    """cpu or cuda: what the ranks compute on, given what the cluster has in all (`ray.cluster_resources()`).

    Raises:
        ClusterError: cuda is asked for and there are fewer GPUs than ranks.
    """
    have = int(resources.get("GPU", 0))
    if cfg.device == "cuda" and have < cfg.ranks:
        raise ClusterError(
            f"cluster.device=cuda: {cfg.ranks} ranks need {cfg.ranks} GPUs, the cluster has {have} (and "
            f"{resources.get('CPU', 0.0):g} CPUs): lower cluster.ranks, or cluster.device=cpu"
        )
    return "cuda" if cfg.device == "cuda" or (cfg.device == "auto" and have >= cfg.ranks) else "cpu"


def transports(wanted: str, device: str, usable: list[list[str]]) -> list[str]:
    """Transports to choose from for ranks on `device`, given exchange.transport and what each rank could use.

    Raises:
        ClusterError: none is left.
    """
    if wanted in ("nccl", "torch_nccl") and device == "cpu":
        raise ClusterError(
            f"exchange.transport={wanted} moves tensors between GPUs, and the cluster has none for every rank: allowed "
            "are auto, gloo"
        )
    if wanted != "auto":
        return [wanted]
    if device == "cpu":
        return ["gloo"]
    found = [t for t in ("nccl", "torch_nccl") if all(t in names for names in usable)]
    if not found:
        raise ClusterError(
            f"exchange.transport=auto: no NCCL can be used by every rank (they could use {usable}): install ray_ep's "
            "extra cuda12 or cuda13, or exchange.transport=gloo"
        )
    return found


def _environment() -> dict[str, str]:
    """Variables of a rank's process: Ray adds them to those of the job, which go first here."""
    given = ray.get_runtime_context().runtime_env.get("env_vars") or {}
    return {k: v for k, v in RANK.items() if k not in given}


def _have() -> str:
    cpus = [n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["Alive"]]
    gpus = sum(n["Resources"].get("GPU", 0.0) for n in ray.nodes() if n["Alive"])
    return f"{len(cpus)} node(s) with {' + '.join(f'{c:g}' for c in cpus)} CPUs and {gpus:g} GPUs"


def _free() -> str:
    return (
        ", ".join(f"{k} {v:g}" for k, v in sorted(ray.available_resources().items()) if k in ("CPU", "GPU"))
        or "nothing"
    )


def _await_gone(actor: Any) -> None:
    try:
        ray.get(actor.where.remote(), timeout=10)
    except (RayActorError, RayError):
        return
