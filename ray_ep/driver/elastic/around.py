"""What the decisions about members see and use around them, as interfaces: ranks, newcomers, counts, signs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ray_ep.collective import Membership
from ray_ep.driver.forming import Formed
from ray_ep.placement.planner.verdict import Question


class Resizing(Protocol):
    """Newcomers on their way, and the switch; the calls' own words are in resize.py."""

    @property
    def took(self) -> Mapping[str, float]:
        """Seconds of each part of the last switch."""

    @property
    def waiting(self) -> int:
        """Asked for, no room yet."""

    @property
    def joining(self) -> int:
        """With room, not built yet."""

    @property
    def ready(self) -> int:
        """The next switch takes them in."""

    def ask(self, count: int) -> None:
        """Ask the cluster for so many more."""

    def avoid(self, nodes: Collection[str]) -> None:
        """From now on place none on these nodes."""

    def withdraw(self, count: int | None = None) -> None:
        """Give up so many, those that are least far first; None: all."""

    def poll(self) -> None:
        """Let them go on."""

    def switch(self, now: Formed, leave: Collection[int], load: np.ndarray) -> Formed:
        """Ranks leave, and all that are ready come in. Raises PlacementError: the others have no room for it."""


class PlacedRanks(Protocol):
    """Of the driver's ranks what is asked here."""

    membership: Membership
    where: list[dict[str, Any]]


class Counts(Protocol):
    """Ranks that have left so far, as recovery counts them."""

    failures: int
    planned_leaves: int


@dataclass(frozen=True, slots=True)
class Signs:
    """What is seen from outside; all but `question` answer at once.

    Args:
        draining: {node: deadline in ms since 1970, 0 for none} of nodes that Ray drains.
        free: how many more ranks each node has room for, those given left out; None: not known.
        forget: what was heard of that room does not hold.
        slow: members that are too slow.
        question: what the planner knows of the present ranks.
    """

    draining: Callable[[], Mapping[str, int]]
    free: Callable[[Collection[str]], Mapping[str, int] | None]
    forget: Callable[[], None]
    slow: Callable[[], Collection[str]]
    question: Callable[[], Question]
