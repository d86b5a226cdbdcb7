"""What makes placed ranks ready to step: tried, joined, measured, built, loaded; and the value that says how.

Everything that the driver derives from who the ranks are is in `Formed`, so that other ranks are another `Formed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ray_ep.collective import Membership
from ray_ep.config.schema import Config
from ray_ep.driver.actors.cluster import transports
from ray_ep.driver.actors.probe import measured_links
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.actors.reach import try_nodes
from ray_ep.driver.rebalance.links import Links
from ray_ep.driver.rebalance.mover import Mover, Scope, check_survival, facts_of, look_every
from ray_ep.driver.rebalance.recent import Facts
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir, checkpoint_url
from ray_ep.driver.start import Plan
from ray_ep.driver.states import States
from ray_ep.moe import Choice
from ray_ep.moe.exchange.ways import DEEPEP
from ray_ep.placement import Placement, RoutingStatistics, Topology, slots_needed
from ray_ep.placement import plan as plan_placement
from ray_ep.placement.planner.survive import fewest_slots
from ray_ep.rank.saved.directory import MANIFEST

ALONE = "memory"
"""Transport of a run on one rank: it has chosen none."""


class ChoosingRanks(Protocol):
    """Of the driver's ranks what decides how they exchange."""

    @property
    def device(self) -> str:
        """cpu or cuda."""

    @property
    def membership(self) -> Membership:
        """Who they are."""

    def transports(self) -> list[list[str]]:
        """Transports that each rank's process could use."""

    def choose_exchange(self, step: int) -> Choice:
        """The fastest way to exchange, timed anew."""


@dataclass(frozen=True, slots=True)
class Formed:
    """Ranks that hold the model in their group and can make the next step.

    Args:
        membership: who they are.
        topology: their links as measured. placement: that they hold.
        choice: how tokens travel. facts: what a step's price depends on with so many ranks.
        done: steps behind them.
    """

    membership: Membership
    topology: Topology
    placement: Placement
    choice: Choice
    facts: Facts
    done: int


def form(cfg: Config, plan: Plan, ranks: Ranks, phase: Callable[[str], None] = lambda name: None) -> Formed:
    """Join the groups, measure the links, build or load the model, choose the exchange. Writes nothing of the run.

    Args:
        ranks: placed, in no group yet.
        phase: told what it is at.

    Raises:
        ClusterError: a node cannot reach what the run needs, or ranks have no transport in common.
        PlacementError: the nodes have no room for placement.survive_nodes.
        RankError: a rank was lost.
    """
    resumed = () if plan.checkpoint is None else (("resume", f"{plan.checkpoint.name}/{MANIFEST}"),)
    try_nodes(ranks, checkpoint_url(cfg, plan.run), (*reads_of(cfg), *resumed))
    topology = connect(cfg, ranks, phase, snapshots=bool(cfg.snapshot.every))
    check_survival(cfg.placement, topology, plan.placement)
    phase("loading the model" if cfg.model.path or plan.checkpoint else "building the model")
    ranks.build(cfg, plan.config, plan.corpus, plan.placement, topology)
    done = 0
    if plan.checkpoint is not None:
        done = plan.checkpoint.step
        ranks.load(plan.checkpoint.directory.url, done)
    phase("choosing the exchange")
    choice = ranks.choose_exchange(done)
    facts = facts_of(cfg, plan.config, plan.expert_parameters, choice.kind, topology.num_ranks)
    return Formed(ranks.membership, topology, plan.placement, choice, facts, done)


def connect(cfg: Config, ranks: Ranks, phase: Callable[[str], None], snapshots: bool = False) -> Topology:
    """Have ranks join their group, one over each transport that there is, and measure the links between them.

    Args:
        snapshots: form a group for these, too.
    """
    phase("connecting the ranks")
    ways = transports(cfg.exchange.transport, ranks.device, ranks.transports())
    ranks.join(cfg.cluster.collective_timeout_s, ways, snapshots=snapshots)
    topology = ranks.topology()
    if cfg.topology.measure and topology.num_ranks > 1:
        phase("measuring the links")
        topology = measured_links(ranks, cfg.topology.budget_s)
    return topology


def ways_on(cfg: Config, ranks: ChoosingRanks, choice: Choice) -> list[str]:
    """Transports over which ranks form their next group: the one in use; after one rank alone, all that there are."""
    if choice.transport != ALONE or ranks.membership.size == 1:
        return [choice.transport]
    return transports(cfg.exchange.transport, ranks.device, ranks.transports())


def choice_on(cfg: Config, ranks: ChoosingRanks, choice: Choice, done: int) -> Choice:
    """How ranks exchange that formed their group over `ways_on`, after `done` steps, once all hold the model.

    They choose again after one rank alone, and where nodes of several ranks are new: two levels were never tried then.
    """
    size, nodes = ranks.membership.size, len(set(ranks.membership.node_of))
    alone = choice.transport == ALONE and size > 1
    tried = any(t.kind == "two_level" for t in choice.timings)
    levels = cfg.exchange.kind == "auto" and choice.kind != DEEPEP and 1 < nodes < size
    return ranks.choose_exchange(done) if alone or (levels and not tried) else choice


def reads_of(cfg: Config) -> tuple[tuple[str, str], ...]:
    """(key, path) of what every node must be able to read."""
    return (("model.path", cfg.model.path),) if cfg.model.path else ()


def placement_for(cfg: Config, placement: Placement, topology: Topology, load: np.ndarray) -> Placement | None:
    """A better placement for ranks that hold `placement` now; None: it stays.

    Args:
        load: [L, E] of recent steps; empty: not known.
    """
    experts, ranks = placement.num_experts, placement.num_ranks
    wanted, least = cfg.placement, slots_needed(experts, ranks)
    slots, survive = max(wanted.slots_per_rank, least), wanted.survive_nodes
    nodes = len(set(topology.node_of.tolist()))
    if survive and (survive >= nodes or slots < fewest_slots(experts, topology.node_of, survive)):
        survive = 0
    even = load.astype(np.int64) if load.size else np.ones((placement.num_layers, experts), np.int64)
    level = "rank" if wanted.level == "auto" else wanted.level
    found = plan_placement(
        RoutingStatistics(even), topology, slots, placement, level=level, seed=cfg.seed, survive_nodes=survive
    )
    return None if found.version == placement.version else found


def mover_of(
    cfg: Config, run: RunDir, ranks: Ranks, formed: Formed, states: States, publish: Callable[[Event], None]
) -> Mover:
    """Rebalancing of the ranks that have formed; it knows nothing of those before them.

    Args:
        run: keeps the topologies and placements that follow. publish: tells an operator.
    """
    links = Links(ranks, formed.topology, cfg.topology.budget_s, look_every(cfg), run.topology, publish)
    return Mover(Scope.of(cfg), ranks, links, formed.placement, formed.facts, states, run.placement, publish)
