"""A checked run from the start of Ray to its end: ranks are placed, the loop runs on them, all of it is taken away."""

from __future__ import annotations

from collections.abc import Callable

from ray_ep.config.schema import Config
from ray_ep.driver.actors.placed import placed
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.actors.shown import NOT_SHOWN, Shown
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.loop import Driver
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.driver.requests import Requests
from ray_ep.driver.start import Plan


def drive(
    cfg: Config,
    plan: Plan,
    publisher: Publisher,
    requests: Requests,
    interrupt: Interrupt,
    phase: Callable[[str], None] = lambda name: None,
    shown: Shown = NOT_SHOWN,
) -> str:
    """Run to the end or to an interruption; returns done or interrupted.

    Args:
        publisher: its first listener is the run's directory.
        requests: what is asked of the run, which looks at `interrupt`; it is closed at the end.
        phase: told what a start is at; empty: it has ended.
        shown: where the run's page is.

    Raises:
        ClusterError: the cluster has no room, or its nodes cannot reach what the run needs; nothing was written.
        RankError: a rank failed; every process that was started is gone.
        DivergedError: a loss, gradient or weight is not finite; what was saved before stays the newest.
        SaveError: the last checkpoint could not be written.
    """
    plan.run.say = lambda words: publisher.event(Event("not-written", words))
    most, name = cfg.elastic.max_ranks, plan.run.path.name
    with placed(cfg.cluster, name, interrupt, phase, most, shown, kind=Ranks) as (ranks, ray):
        driver = Driver(cfg, plan, ranks, publisher, requests)
        with driver.told():
            driver.form(ray.words, phase)
            if shown.link:
                also = f" and in Ray's dashboard at {ray.page}" if ray.page else ""
                fields = {"address": shown.link, "dashboard": ray.page}
                publisher.event(Event("page", f"shown at {shown.link}{also}", fields))
            interrupt.tell = driver.signalled
            return driver.run()
