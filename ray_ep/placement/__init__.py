"""Placement of experts: pure NumPy, usable alone, from a notebook, for a cluster that does not exist."""

from ray_ep.placement.baselines import contiguous, random, slots_needed
from ray_ep.placement.placement import Placement
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

__all__ = ["Placement", "RoutingStatistics", "Topology", "contiguous", "random", "slots_needed"]
