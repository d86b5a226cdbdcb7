"""Measuring the links of a cluster: ranks without a model, formed for it and taken away again, or those of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ray_ep.config.schema import Config
from ray_ep.driver.cluster import connected, starting, transports
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.ranks import Ranks
from ray_ep.errors import ConfigError
from ray_ep.placement import Topology
from ray_ep.placement.links.gpu_links import joined
from ray_ep.placement.links.groups import best_of, contradictions


def measured(ranks: Ranks, budget_s: float) -> Topology:
    """Links between ranks that have joined their group and are not computing.

    Where they contradict what Ray says of the nodes, or the GPUs' driver of their links, they are measured once more,
    for a busy machine can do that too.

    Raises:
        RankError: a rank died or was unreachable while probing, which names it; the group is then unusable.
    """
    node_of = ranks.topology().node_of
    topology: Topology = ranks.call("probe", node_of, budget_s)[0]
    topology = replace(topology, joined=joined(ranks.call("gpu_links")))
    if contradictions(topology):
        again: Topology = ranks.call("probe", node_of, budget_s)[0]
        topology = best_of(topology, replace(again, joined=topology.joined))
    return topology


def probe_cluster(
    cfg: Config, budget_s: float, interrupt: Interrupt, phase: Callable[[str], None] = lambda name: None
) -> Topology:
    """Start or join Ray as a run does, place the ranks, measure the links between them, and leave nothing behind.

    Args:
        cfg: `cluster` is read.
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
    interrupt.hold()
    phase(starting(cfg.cluster))
    with connected(cfg.cluster, interrupt) as joined:
        interrupt.hold()
        if interrupt():
            raise KeyboardInterrupt
        phase(f"placing {cfg.cluster.ranks} ranks")
        ranks = Ranks(cfg.cluster, f"ray_ep-probe-{time.time_ns() % 10**9}", joined.local, interrupt)
        try:
            phase("measuring the links")
            ways = transports(cfg.exchange.transport, ranks.device, ranks.call("transports"))[:1]
            ranks.call("join", ranks.name, 0, cfg.cluster.collective_timeout_s, ways)
            return measured(ranks, budget_s)
        finally:
            ranks.kill()
