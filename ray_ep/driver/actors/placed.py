"""Ranks for as long as somebody needs them: Ray started or joined, actors placed, and all of it taken away again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.cluster import connected, starting
from ray_ep.driver.actors.placing import check_growth
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.interrupt import Interrupt


@contextmanager
def placed(
    cfg: ClusterConfig, name: str, interrupt: Interrupt, phase: Callable[[str], None], most: int = 0
) -> Iterator[tuple[Ranks, str]]:
    """Inside: ranks that have been placed and have not joined a group yet, and which Ray they are on, in words.

    Args:
        name: of the placement group, to begin with.
        interrupt: looked at in every wait; what was started is taken away first.
        phase: told what it is at.
        most: ranks that there may be later.

    Raises:
        ClusterError: Ray cannot be started or joined, or has no room for the ranks, or never for `most`.
        KeyboardInterrupt: a stop was asked for meanwhile.
    """
    interrupt.hold()
    phase(starting(cfg))
    with connected(cfg, interrupt) as joined:
        interrupt.hold()
        if interrupt():
            raise KeyboardInterrupt
        check_growth(cfg, most, joined.local)
        phase(f"placing {cfg.ranks} ranks")
        ranks = Ranks(cfg, f"ray_ep-{name}-{time.time_ns() % 10**9}", joined.local, interrupt)
        try:
            yield ranks, joined.words
        finally:
            ranks.kill()
