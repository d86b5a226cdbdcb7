"""The rank actors of a run: placed on a cluster, called together, taken away again. One method for each call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import numpy as np
import ray
from omegaconf import OmegaConf
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedConfig

from ray_ep.config.process import RANK
from ray_ep.config.schema import ClusterConfig, Config
from ray_ep.driver.cause import for_memory, lost_peer, root_cause
from ray_ep.driver.cluster import SLICE_S, device_of
from ray_ep.errors import ClusterError, RankError, SaveError
from ray_ep.moe import Choice
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.links.gpu_links import GpuLinks
from ray_ep.rank.actor import RankActor
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.memory import oom_kills
from ray_ep.rank.reach import Trial
from ray_ep.rank.results import StepResult

_ROOT_CAUSE_S = 2.0
"""How long to wait for other ranks' words after one failed with a lost peer: the peer's own traceback says why."""


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
            left = SLICE_S if limit is None else limit - time.monotonic()
            if left <= 0:
                break
            done, pending = ray.wait(pending, num_returns=1, timeout=min(left, SLICE_S))
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

    def reach(self, trial: Trial) -> list[list[str]]:
        """What each rank's node cannot read or write of what the run needs there, in words."""
        return self.call("reach", trial)

    def transports(self) -> list[list[str]]:
        """Transports that each rank's process could use."""
        return self.call("transports")

    def join(self, epoch: int, timeout_s: float, transports: list[str]) -> None:
        """Form the group of an epoch, once over each of the transports."""
        self.call("join", self.name, epoch, timeout_s, transports)

    def probe(self, node_of: np.ndarray, budget_s: float) -> Topology:
        """The links between all ranks, measured."""
        topology: Topology = self.call("probe", node_of, budget_s)[0]
        return topology

    def probe_links(self, known: Topology, pairs: list[tuple[int, int]], budget_s: float) -> Topology:
        """`known` with the links between `pairs` of ranks measured again."""
        topology: Topology = self.call("probe_links", known, pairs, budget_s)[0]
        return topology

    def gpu_links(self) -> list[GpuLinks | None]:
        """What the driver of each rank's GPU says of its links; None without one."""
        return self.call("gpu_links")

    def build(
        self, cfg: Config, config: PreTrainedConfig, corpus: Corpus, placement: Placement, topology: Topology
    ) -> None:
        """Build the model on every rank, and put the corpus where every rank of a node reads the same copy."""
        self.call("build", OmegaConf.to_container(cfg), config, ray.put(corpus), placement, topology)

    def load(self, url: str, step: int) -> None:
        """Take on checkpoint `step` of the directory `url`."""
        self.call("load", url, step)

    def choose_exchange(self, step: int) -> Choice:
        """The fastest way to exchange, timed on the batch of `step`; the ranks have taken it."""
        choice: Choice = self.call("choose_exchange", step)[0]
        return choice

    def train_step(self, step: int) -> list[StepResult] | None:
        """One optimizer step (from 0), as each rank saw it; None: it was broken off (`stop`), on every rank."""
        results: list[StepResult | None] = self.call("train_step", step)
        whole = [r for r in results if r is not None]
        return whole if len(whole) == len(results) else None

    def evaluate(self) -> tuple[float, list[list[dict[str, np.ndarray]]]] | None:
        """Loss on the held-out split, and each rank's trace of who answered; None: it was broken off (`stop`)."""
        answers = self.call("evaluate", True)
        if any(a is None for a in answers):
            return None
        return float(answers[0][0]), [trace for _, trace in answers]

    def save(self, url: str, step: int) -> list[dict[str, list[Any]]]:
        """Write checkpoint `step` into the directory `url`; each rank's part of the manifest. Raises SaveError."""
        parts = self.call("save", url, step)
        for part in parts:
            if isinstance(part, SaveError):
                raise part
        return parts

    def statistics(self) -> list[RoutingStatistics]:
        """Routing statistics of each rank since its making."""
        return self.call("statistics")

    def sample(self) -> np.ndarray:
        """[L, N, K] expert sets of the ranks' reservoirs of recent tokens."""
        return np.concatenate(self.call("sample"), axis=1)

    def migrate(self, placement: Placement, buffer_mb: float) -> None:
        """Have the experts moved. Raises BadInput: every rank has refused, nothing has changed."""
        self.call("migrate", placement, buffer_mb)

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
        while not self._group.wait(SLICE_S):
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
