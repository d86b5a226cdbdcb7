"""Figures of the measured links: few, however many ranks there are. NumPy and the topology; R ranks."""

from __future__ import annotations

import numpy as np

from ray_ep.driver.rebalance.links import changed_links
from ray_ep.observe.metrics.figures import Figures
from ray_ep.observe.metrics.table import PLACES
from ray_ep.placement import Topology

NAMES = (
    "ep_link_bandwidth_bytes_per_second",
    "ep_slowest_link_bandwidth_bytes_per_second",
    "ep_slowest_link_rank",
    "ep_slowed_links",
    "ep_link_slowdown",
)
"""Metrics that are told here."""


def tell_links(figures: Figures, topology: Topology, first: Topology) -> None:
    """Put what `topology` says into `figures`; `first` is what was measured first between the same ranks.

    Links that were not measured are left out, so that a run without measurement tells nothing.
    """
    figures.forget(*NAMES)
    n = topology.num_ranks
    bandwidth = np.where(np.eye(n, dtype=bool), np.inf, topology.bandwidth)  # [R, R] bytes/s
    same = topology.node_of[:, None] == topology.node_of
    if not np.isfinite(bandwidth).any():
        return
    for scope, links in (("intra_node", same), ("inter_node", ~same)):
        known = bandwidth[links & np.isfinite(bandwidth)]
        for statistic, of in (("min", np.min), ("median", np.median), ("max", np.max)) if known.size else ():
            figures.put(NAMES[0], float(of(known)), scope, statistic)
    order = np.argsort(bandwidth, axis=None, kind="stable")[:PLACES]
    for place, (a, b) in enumerate((divmod(int(at), n) for at in order), 1):
        if np.isfinite(bandwidth[a, b]):
            figures.put(NAMES[1], float(bandwidth[a, b]), place)
            figures.put(NAMES[2], a, place, "source")
            figures.put(NAMES[2], b, place, "destination")
    slower = [times for times in changed_links(first, topology).values() if times > 1]
    figures.put(NAMES[3], len(slower))
    figures.put(NAMES[4], max(slower, default=1.0))
