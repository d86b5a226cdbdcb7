"""A run's page and every way to it, for as long as the run goes: its own address, and Ray's dashboard."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from ray_ep.config.schema import Config
from ray_ep.driver.actors.cluster import starts
from ray_ep.driver.actors.shown import Page, Shown
from ray_ep.observe.page.serving import served

if TYPE_CHECKING:  # it imports aiohttp
    from ray_ep.observe.page.buttons import RunControl


@contextmanager
def shown(cfg: Config, run_dir: Path, tell: Callable[[str], None], control: RunControl) -> Iterator[Shown]:
    """Inside: the page is served; what Ray is to be told of it, before it is started or joined.

    On a cluster the page is there for its head, too, on the driver's address: for who sends a key that only Ray's store
    has. On a local Ray with a dashboard a server of this process is what the dashboard asks first.

    Args:
        tell: told in one sentence what is not served, and why.
        control: what the page's buttons ask.
    """
    alone, run = starts(cfg.cluster), run_dir.resolve()
    here = "" if alone else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    relay = (here, secrets.token_urlsafe(32)) if here else None
    with served(run_dir, cfg.observe, tell, relay, control) as page, ExitStack() as ways:
        own = page.address.removesuffix("/ray_ep/")
        reached, key = (page.relayed, relay[1]) if page.relayed and relay else (own, "")
        found = Page(run.name, str(run), reached, key) if own else None
        proxy = ""
        if alone and cfg.cluster.dashboard and found is not None:
            proxy = ways.enter_context(_before_the_dashboard(found))
        yield Shown(found, page.address, proxy, run.name, str(run))


@contextmanager
def _before_the_dashboard(page: Page) -> Iterator[str]:
    """Inside: the proxy of this one page is served at the address."""
    from ray_ep.observe.dashboard.proxy import Proxy  # aiohttp takes a moment, which a run without a dashboard spares
    from ray_ep.observe.dashboard.serving import beside

    async def known() -> dict[str, Page]:
        return {page.name: page}

    with beside(Proxy(known)) as address:
        yield address
