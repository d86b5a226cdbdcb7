"""Ranks that have left a run, counted: a planned leave is no failure. Who is asked why is passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def _unplanned(node: str) -> str:
    return ""


class Departures:
    """How many ranks have left so far.

    Args:
        planned: why the loss of what was on a node, by Ray's id, was planned, in words; "": it was a failure.

    Attributes:
        planned_leaves: those that handed over and went are added by whoever had them go.
    """

    def __init__(self, planned: Callable[[str], str] = _unplanned):
        self._planned = planned
        self.failures = self.planned_leaves = 0

    def lost(self, nodes: Sequence[str]) -> tuple[str, bool]:
        """Count ranks that were lost, given the node of each: why, where that was planned, and whether all were."""
        why = {node: self._planned(node) for node in dict.fromkeys(nodes)}
        planned = sum(bool(why[node]) for node in nodes)
        self.planned_leaves += planned
        self.failures += len(nodes) - planned
        return "; ".join(dict.fromkeys(filter(None, why.values()))), 0 < planned == len(nodes)
