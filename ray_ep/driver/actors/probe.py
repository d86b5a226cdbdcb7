"""Measuring the links of a cluster: ranks without a model, formed for it and taken away again, or those of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ray_ep.config.schema import Config
from ray_ep.driver.actors.cluster import transports
from ray_ep.driver.actors.placed import placed
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import ConfigError
from ray_ep.placement import Topology
from ray_ep.placement.links.gpu_links import GpuLinks, joined
from ray_ep.placement.links.groups import best_of, contradictions


class ProbingRanks(Protocol):
    """What measuring needs of the ranks."""

    def topology(self) -> Topology:
        """Who shares a node."""

    def probe(self, node_of: np.ndarray[Any, Any], budget_s: float) -> Topology:
        """The links between all ranks, measured."""

    def gpu_links(self) -> list[GpuLinks | None]:
        """What the driver of each rank's GPU says of its links."""


def measured_links(ranks: ProbingRanks, budget_s: float) -> Topology:
    """Links between ranks that have joined their group and are not computing.

    Where they contradict what Ray says of the nodes, or the GPUs' driver of their links, they are measured once more,
    for a busy machine can do that too.

    Raises:
        RankError: a rank died or was unreachable while probing, which names it; the group is then unusable.
    """
    node_of = ranks.topology().node_of
    topology = replace(ranks.probe(node_of, budget_s), joined=joined(ranks.gpu_links()))
    if contradictions(topology):
        again = ranks.probe(node_of, budget_s)
        topology = best_of(topology, replace(again, joined=topology.joined))
    return topology


def probe_cluster(
    cfg: Config, budget_s: float, interrupt: Interrupt, phase: Callable[[str], None] = lambda name: None
) -> Topology:
    """Start or join Ray as a run does, place the ranks, measure the links between them, and leave nothing behind.

    Args:
        cfg: `cluster` and `exchange.transport` are read.
        budget_s: about how long the measuring may take.
        interrupt: looked at in every wait; what was started is taken away first.
        phase: told what it is at.

    Raises:
        ConfigError: fewer than two ranks have no link.
        ClusterError: the cluster has no room for the ranks.
        RankError: a rank died or was unreachable while probing.
    """
    if cfg.cluster.ranks < 2:
        raise ConfigError(f"cluster.ranks={cfg.cluster.ranks}: links are between ranks, so at least 2 are needed")
    with placed(cfg.cluster, "probe", interrupt, phase, kind=Ranks) as (ranks, _):
        phase("measuring the links")
        ways = transports(cfg.exchange.transport, ranks.device, ranks.transports())
        ranks.join(cfg.cluster.collective_timeout_s, ways[:1])
        return measured_links(ranks, budget_s)
