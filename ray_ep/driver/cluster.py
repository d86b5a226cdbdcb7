"""The Ray cluster of a run: started or joined, checked for room, ranks placed on it and taken away again."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ep.collective.probe import ProbeError
from ray_ep.config.process import RANK
from ray_ep.config.schema import ClusterConfig
from ray_ep.errors import BadInput, ClusterError, GroupError, RankError, SaveError
from ray_ep.placement import Topology
from ray_ep.rank.actor import RankActor

_ROOT_CAUSE_S = 2.0
"""How long to wait for other ranks' words after one failed with a lost peer: the peer's own traceback says why."""


@contextmanager
def connected(cfg: ClusterConfig) -> Iterator[bool]:
    """Join the cluster that cfg or RAY_ADDRESS names, else start a local Ray; yields whether it was started here.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield False
        return
    address = cfg.address or os.environ.get("RAY_ADDRESS", "")
    _check_answers(address)
    options = {"address": address} if address else {"address": "local", "include_dashboard": cfg.dashboard}
    logging.getLogger("ray").setLevel(logging.ERROR)
    # In a thread of its own: on the main thread Ray takes SIGTERM over and leaves half a cluster behind when it comes.
    starter = ThreadPoolExecutor(1, "ray-init")
    try:
        starter.submit(ray.init, logging_level="ERROR", log_to_driver=False, **options).result()
    except (ConnectionError, RuntimeError, ValueError, RayError) as e:
        raise ClusterError(f"cluster.address={address!r}: no Ray cluster answers there: {e}") from None
    try:
        yield not address
    finally:
        ray.shutdown()


class Ranks:
    """The rank actors of one epoch."""

    def __init__(self, cfg: ClusterConfig, name: str, local: bool, interrupted: Callable[[], bool]):
        """Place one actor a rank.

        Raises:
            ClusterError: the cluster has no room for them; the message says what it has.
        """
        self.cfg, self.name = cfg, name
        self.device = device_of(cfg, ray.cluster_resources())
        _check_room(cfg, local)
        gpus = int(self.device == "cuda")
        bundles = [{"CPU": float(cfg.cpus_per_rank)} | ({"GPU": 1.0} if gpus else {})] * cfg.ranks
        self._group = placement_group(bundles, strategy="PACK", name=name)
        self.actors: list[Any] = []
        try:
            self._await_room(interrupted)
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
            BadInput: a rank found the user's input wrong.
        """
        calls = {getattr(a, method).remote(*args): r for r, a in enumerate(self.actors)}
        results: list[Any] = [None] * len(self.actors)
        pending, failed = list(calls), {}
        limit = None
        while pending:
            wait = None if limit is None else max(0.0, limit - time.monotonic())
            done, pending = ray.wait(pending, num_returns=1, timeout=wait)
            if not done:
                break
            try:
                results[calls[done[0]]] = ray.get(done[0])
            except Exception as e:
                failed[calls[done[0]]] = e
                limit = limit or time.monotonic() + _ROOT_CAUSE_S
                if not _lost_peer(e):
                    break
        if failed:
            raise _root_cause(failed, [calls[c] for c in pending])
        return results

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

    def _await_room(self, interrupted: Callable[[], bool]) -> None:
        limit = time.monotonic() + self.cfg.wait_s
        while not self._group.wait(1):
            if interrupted():
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


def _check_answers(address: str) -> None:
    """Refuse HOST:PORT where nothing listens: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(f"cluster.address={address!r}: no Ray cluster answers there: {e}") from None


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


def _lost_peer(e: Exception) -> bool:
    """Whether a rank failed only since another did."""
    return isinstance(e, GroupError)


def unreachable(partners: dict[int, int | None], silent: list[int]) -> int | None:
    """Which rank the others could not reach while probing; None: nothing tells.

    Args:
        partners: of each rank whose probing failed, the rank at the other end of the link then; None: it met all.
        silent: ranks that have said nothing yet. Some only wait for others, so a partner is suspected first.
    """
    named = Counter(p for p in partners.values() if p is not None)
    if named:  # the silent one first, then the one that most could not reach
        return min(named, key=lambda r: (r not in silent, -named[r], r))
    return silent[0] if len(silent) == 1 else None


def _root_cause(failed: dict[int, Exception], silent: list[int]) -> Exception:
    """Of several ranks' failures the one that explains the others, as an error of ours."""
    rank, e = min(failed.items(), key=lambda item: (_lost_peer(item[1]), item[0]))
    if isinstance(e, ProbeError):  # all are: a rank that died or raised would have come first
        lost = unreachable({r: x.partner for r, x in failed.items() if isinstance(x, ProbeError)}, silent)
        rank = rank if lost is None else lost
        return RankError(rank, f"rank {rank} was unreachable while probing the links:\n{e}")
    if isinstance(e, BadInput | SaveError) and isinstance(e, RayTaskError):
        return type(e.cause)(str(e.cause))
    if isinstance(e, RayActorError):
        return RankError(rank, f"rank {rank} died: {e}")
    return RankError(rank, f"rank {rank} raised:\n{e}")


def _await_gone(actor: Any) -> None:
    try:
        ray.get(actor.where.remote(), timeout=10)
    except (RayActorError, RayError):
        return
