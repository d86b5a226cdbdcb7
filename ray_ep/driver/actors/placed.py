"""Ranks for as long as somebody needs them: Ray started or joined, actors placed, and all of it taken away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.cluster import Joined, connected, starting
from ray_ep.driver.actors.placing import check_growth
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.actors.shown import NOT_SHOWN, Shown, announced
from ray_ep.driver.interrupt import Interrupt

AnyRanks = TypeVar("AnyRanks", bound=Ranks)


@contextmanager
def placed(
    cfg: ClusterConfig,
    name: str,
    interrupt: Interrupt,
    phase: Callable[[str], None],
    most: int = 0,
    shown: Shown = NOT_SHOWN,
    *,
    kind: type[AnyRanks],
) -> Iterator[tuple[AnyRanks, Joined]]:
    """Inside: ranks that have been placed and have not joined a group yet, and which Ray they are on.

    Args:
        name: of the run; names of its actors and placement groups begin with it.
        interrupt: looked at in every wait; what was started is taken away first.
        phase: told what it is at.
        most: ranks that there may be later.
        kind: class of the ranks, for what they compute.
        shown: how whoever looks from the cluster finds the run's page.

    Raises:
        ClusterError: Ray cannot be started or joined, or has no room for the ranks, or never for `most`.
        KeyboardInterrupt: a stop was asked for meanwhile.
    """
    interrupt.hold()
    phase(starting(cfg))
    with connected(cfg, interrupt, shown) as joined, announced(shown) as seen:
        interrupt.hold()
        if interrupt():
            raise KeyboardInterrupt
        check_growth(cfg, most, joined.local)
        phase(f"placing {cfg.ranks} ranks")
        ranks = kind(cfg, name, joined.local, interrupt)
        try:
            yield ranks, replace(joined, page=seen)
        finally:
            ranks.kill()
