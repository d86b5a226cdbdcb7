"""The rank actors of a run: placed on a cluster, called together, taken away again. One method for each call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedConfig

from ray_ep.collective import Membership
from ray_ep.collective.ray_backend import RENDEZVOUS_S
from ray_ep.config.schema import ClusterConfig, Config
from ray_ep.driver.actors.calls import Calls
from ray_ep.driver.actors.cluster import device_of
from ray_ep.driver.actors.gone import Gone
from ray_ep.driver.actors.head import HEAD_S, within
from ray_ep.driver.actors.heartbeat import Heartbeat
from ray_ep.driver.actors.newcomers import Newcomer, Newcomers
from ray_ep.driver.actors.placing import Place, Places, check_cpus, resources
from ray_ep.driver.actors.processes import Starter, end, kill, locate
from ray_ep.driver.recovery.decide import Survivor
from ray_ep.errors import SaveError
from ray_ep.moe import Choice
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.links.gpu_links import GpuLinks
from ray_ep.rank.actor import RankActor
from ray_ep.rank.data.corpus import Corpus
from ray_ep.rank.pretrained.reading import Read
from ray_ep.rank.reach import DirectoryTrial
from ray_ep.rank.results import StepResult
from ray_ep.rank.snapshot.on_disk import Shelf
from ray_ep.rank.snapshot.restore import Rewind

log = logging.getLogger(__name__)

_READ_S = 5.0
"""How long to wait for what ranks say of their reading."""
_START_S = 300.0
"""Least time that a rank has to start: imports took 4 to 20 s, and over 60 s where 20 processes shared a core."""


class Ranks(Calls):
    """The rank actors of a run.

    Attributes:
        device: cpu or cuda. note: what an operator should know of it; "": nothing.
    """

    def __init__(
        self, cfg: ClusterConfig, name: str, local: bool, interrupted: Callable[[], bool], actor: Any = RankActor
    ):
        """Place one actor a rank.

        Args:
            name: of the run, which names of actors and groups tell.
            interrupted: asked every moment of every wait; may raise KeyboardInterrupt to leave it.
            actor: class of the actors, made with rank, number of ranks, threads and device.

        Raises:
            ClusterError: the cluster has no room for them; the message says what it has.
            RankError: a rank died or went silent while it started.
        """
        self.cfg, self._interrupted = cfg, interrupted
        self.name = f"ray_ep-{name}-{time.time_ns() % 10**9}"  # of groups: used once
        built = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        found = device_of(cfg, resources(), built, local)
        self.device, self.note = found.kind, found.note
        if self.note:
            log.warning(self.note)
        check_cpus(cfg, local)
        self._room = Places(cfg, self.name, self.device == "cuda", interrupted)
        self._places: list[Place] = []
        self.actors: list[Any] = []
        self.where: list[dict[str, Any]] = []
        self._gone = Gone()
        self._lost: list[dict[str, Any]] = []  # where ranks were that were killed and may still be there
        self._number: dict[str, int] = {}  # of each node, as topologies have it
        start_s = max(cfg.wait_s, _START_S)
        self._starter = Starter(cfg, name, self.device, actor)
        self.newcomers = Newcomers(self._room, self._starter.start, start_s)
        self._shelf: Any = None  # of snapshots on disk, as Ray's store has it
        try:
            self._places = self._room.take(cfg.ranks)
            self.where = [
                {"rank": rank, "node": p.node, "host": p.host, "address": p.address, "port": p.port}
                for rank, p in enumerate(self._places)
            ]
            members = tuple(f"rank-{rank}" for rank in range(cfg.ranks))
            self.membership = Membership(0, members, tuple(self._node(p.node) for p in self._places))
            self._members = cfg.ranks  # so far: an id is never used twice
            self.actors = [self._starter.start(*seat) for seat in zip(self._places, members, strict=True)]
            self._heartbeat = self._listen()
            self.where = [{**w, **said} for w, said in zip(self.where, self._call("where"), strict=True)]
        except BaseException:
            self.kill()
            raise

    def _listen(self) -> Heartbeat:
        return Heartbeat(self.actors, self.cfg.silence_s, max(self.cfg.wait_s, _START_S))

    def topology(self) -> Topology:
        """Who shares a node, as Ray says."""
        return Topology.of_nodes(list(self.membership.node_of))

    def _node(self, node: str) -> int:
        """The number of a node: that of its first rank's turn, for ever."""
        return self._number.setdefault(node, len(self._number))

    def lose(self, lost: Collection[int], come: Sequence[Newcomer] = ()) -> None:
        """Go on without these ranks: they are killed, their room is given back, the others are numbered anew.

        The group of before is of no use any more; `join` forms that of the epoch that begins here.

        Args:
            come: those that are in it from here on, behind the others.
        """
        locate(self.where, self.actors)
        for rank in lost:
            kill([self.actors[rank]])
            self._lost.append(self.where[rank])
            within(HEAD_S, partial(self._give_up, [self._places[rank]]))
        nodes = {n.member: self._node(n.where["node"]) for n in come}
        self.membership = self.membership.next([self.membership.members[rank] for rank in lost], nodes)
        stay = [rank for rank in range(len(self.actors)) if rank not in lost]
        self.actors = [*(self.actors[rank] for rank in stay), *(n.actor for n in come)]
        self._places = [*(self._places[rank] for rank in stay), *(n.place for n in come if n.place)]
        where = [*(self.where[rank] for rank in stay), *(n.where for n in come)]
        self.where = [{**w, "rank": rank} for rank, w in enumerate(where)]
        self._heartbeat = self._listen()

    def ask(self, count: int) -> None:
        """Ask the cluster for so many ranks more: `newcomers` tells how far they are; they come in by `lose`."""
        first, self._members = self._members, self._members + count
        self.newcomers.ask([f"rank-{number}" for number in range(first, self._members)])

    def avoid(self, nodes: Collection[str]) -> None:
        """From now on ask for room on none of these nodes."""
        self._room.avoided = frozenset(nodes)

    def room(self) -> dict[str, int]:
        """How many ranks more each node has room for now."""
        return self._room.room()

    def reach(self, trial: DirectoryTrial) -> list[list[str]]:
        """What each rank's node cannot read or write of what the run needs there, in words."""
        return self._call("reach", trial)

    def transports(self) -> list[list[str]]:
        """Transports that each rank's process could use."""
        return self._call("transports")

    def join(
        self, timeout_s: float, transports: list[str], snapshots: bool = False, limit_s: float = RENDEZVOUS_S
    ) -> None:
        """Form the group of the membership, once over each of the transports.

        Args:
            timeout_s: of a collective. limit_s: for all to come, over each transport.
            snapshots: form a group for these, too.
        """
        seats = [((rank, self.membership.size), snapshots) for rank in range(self.membership.size)]
        self._call("join", self.name, self.membership.epoch, timeout_s, transports, limit_s, each=seats)

    def probe(self, node_of: np.ndarray, budget_s: float) -> Topology:
        """The links between all ranks, measured."""
        topology: Topology = self._call("probe", node_of, budget_s)[0]
        return topology

    def probe_links(self, known: Topology, pairs: list[tuple[int, int]], budget_s: float) -> Topology:
        """`known` with the links between `pairs` of ranks measured again."""
        topology: Topology = self._call("probe_links", known, pairs, budget_s)[0]
        return topology

    def gpu_links(self) -> list[GpuLinks | None]:
        """What the driver of each rank's GPU says of its links; None without one."""
        return self._call("gpu_links")

    def build(
        self, cfg: Config, config: PreTrainedConfig, corpus: Corpus, placement: Placement, topology: Topology
    ) -> None:
        """Build the model on every rank, and put the corpus where every rank of a node reads the same copy."""
        self._call("build", OmegaConf.to_container(cfg), config, ray.put(corpus), placement, topology)

    def reads(self) -> list[Read]:
        """What each rank has read of the model's checkpoint; nobody waits long for it, and silence is no error here."""
        try:
            found: list[Read] = ray.get([actor.read.remote() for actor in self.actors], timeout=_READ_S)
        except Exception:  # a rank that is lost is noticed by who waits for its call
            return []
        return found

    def load(self, url: str, step: int) -> None:
        """Take on checkpoint `step` of the directory `url`."""
        self._call("load", url, step)

    def choose_exchange(self, step: int) -> Choice:
        """The fastest way to exchange, timed on the batch of `step`; the ranks have taken it."""
        choice: Choice = self._call("choose_exchange", step)[0]
        return choice

    def train_step(self, step: int) -> list[StepResult] | None:
        """One optimizer step (from 0), as each rank saw it; None: it was broken off (`stop`), on every rank."""
        results: list[StepResult | None] = self._call("train_step", step)
        whole = [r for r in results if r is not None]
        return whole if len(whole) == len(results) else None

    def evaluate(self) -> tuple[float, list[list[dict[str, np.ndarray]]]] | None:
        """Loss on the held-out split, and each rank's trace of who answered; None: it was broken off (`stop`)."""
        answers = self._call("evaluate", True)
        if any(a is None for a in answers):
            return None
        return float(answers[0][0]), [trace for _, trace in answers]

    def save(self, url: str, step: int) -> list[dict[str, list[Any]]]:
        """Write checkpoint `step` into the directory `url`; each rank's part of the manifest. Raises SaveError."""
        parts = self._call("save", url, step)
        for part in parts:
            if isinstance(part, SaveError):
                raise part
        return parts

    def statistics(self) -> list[RoutingStatistics]:
        """Routing statistics of each rank since its making."""
        return self._call("statistics")

    def sample(self) -> np.ndarray:
        """[L, N, K] expert sets of the ranks' reservoirs of recent tokens."""
        return np.concatenate(self._call("sample"), axis=1)

    def snapshot(self, step: int, shelf: Shelf | None = None) -> str:
        """Take a snapshot of the state after `step` steps, which goes to disk, too, if there is a shelf.

        Returns:
            why the one before is not on disk, though it should be; "": it is.
        """
        if shelf is not None and self._shelf is None:
            self._shelf = ray.put(shelf)  # the same for the whole run
        faults: list[str] = self._call("snapshot", step, list(self.membership.node_of), shelf and self._shelf)
        return next(filter(None, faults), "")

    def end_snapshot(self) -> None:
        """Wait until the last snapshot is whole, before anybody leaves: what is written of it to disk ends soon."""
        self._call("end_snapshot")

    def states(self) -> dict[str, Survivor]:
        """What each member says of itself, also after a call that failed."""
        return {m: Survivor(*said) for m, said in zip(self.membership.members, self._call("state"), strict=True)}

    def settle(self, finish: int | None) -> None:
        """Half steps are finished where all of step `finish` is reduced, else forgotten. Not collective."""
        self._call("settle", finish)

    def publish(self) -> None:
        """Primaries' weights go to their replicas; again does no harm."""
        self._call("publish")

    def regroup(self, placement: Placement, topology: Topology, fresh: tuple[int, ...] = ()) -> None:
        """On over the group that was joined, each with what it has; `fresh` ones are given what every rank has."""
        self._call("regroup", placement, topology, fresh)

    def restore(self, to: Rewind) -> None:
        """Back to a snapshot, and on over the group that was joined."""
        self._call("restore", to)

    def bequeath(self, leave: Collection[int], heir: int) -> None:
        """The routing statistics of ranks that leave count as those of `heir` from now on."""
        ranks = range(len(self.actors))
        sums = self._call("counted", each=[(rank in leave,) for rank in ranks])
        each = [([sums[r] for r in leave] if rank == heir else [],) for rank in ranks]
        self._call("count", each=each)

    def migrate(self, placement: Placement, buffer_mb: float) -> None:
        """Have the experts moved. Raises BadInput: every rank has refused, nothing has changed."""
        self._call("migrate", placement, buffer_mb, title=f"move to placement {placement.version}")

    def beat(self) -> None:
        """Nothing is to be done: hear from every rank that it is there. Raises LostError."""
        self._call("ping")

    def stop(self) -> None:
        """Ask all ranks, which may be computing, to leave an evaluation or a step of several passes early."""
        for actor in self.actors:
            actor.stop.remote()

    def kill(self) -> list[str]:
        """Stop every rank and give its place back.

        Returns:
            Within some seconds, what is not known to be gone, in words, which are logged, too.
        """
        locate(self.where, self.actors)
        end([*self.actors, *self.newcomers.actors])
        self.newcomers.withdraw()
        left = self._gone.awaited([*self.where[: len(self.actors)], *self._lost])
        within(HEAD_S, partial(self._give_up, list(self._places)))
        self.actors, self._places, self._lost = [], [], []
        for words in left:
            log.warning(words)
        return left

    def _give_up(self, places: Sequence[Place]) -> None:
        for place in places:
            self._room.give_up(place)
