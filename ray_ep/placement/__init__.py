"""Placement of experts: pure NumPy and compiled kernels, usable alone, for a cluster that does not exist."""

from ray_ep.placement.baselines import contiguous, random, slots_needed
from ray_ep.placement.cost.figures import StepCosts
from ray_ep.placement.cost.predict import Migration, Prediction, migration, predict
from ray_ep.placement.in_step.rules import StepPlan, StepRules, balance_step
from ray_ep.placement.migration import Move, moves
from ray_ep.placement.placement import Placement
from ray_ep.placement.planner.load_only import load_only
from ray_ep.placement.planner.plan import plan
from ray_ep.placement.statistics import RoutingStatistics
from ray_ep.placement.topology import Topology

__all__ = [
    "Migration",
    "Move",
    "Placement",
    "Prediction",
    "RoutingStatistics",
    "StepCosts",
    "StepPlan",
    "StepRules",
    "Topology",
    "balance_step",
    "contiguous",
    "load_only",
    "migration",
    "moves",
    "plan",
    "predict",
    "random",
    "slots_needed",
]
