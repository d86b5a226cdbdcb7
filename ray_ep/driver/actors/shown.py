"""Where a run shows itself, as everybody on its cluster finds it: a key in Ray's internal store, the job's metadata.

Imports Ray, and only where it is asked for: whoever looks for runs need not have joined the cluster.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

from ray_ep.driver.actors.head import HEAD_S, within

NAMESPACE = b"ray_ep"
"""Of the keys in Ray's internal store."""
PAGES = b"pages/"
"""How the key of a run begins; its name follows."""
PROXY = b"proxy"
"""The key that a proxy before the dashboard of this cluster has put there."""
KEY = "X-Ray-Ep-Key"
"""The header with a page's key."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """The server of a run's page.

    Args:
        name: of the run: its directory's, or longer where another run has that.
        run_dir: absolute. address: http://HOST:PORT.
        key: what a request that comes over the network must carry in the header KEY; "": nothing.
        job: Ray's id of the driver, once it has joined; "": not known.
        ended: Ray says that the driver is gone; one that was killed leaves its page among the others.
    """

    name: str
    run_dir: str
    address: str
    key: str = ""
    job: str = ""
    ended: bool = False

    def to_json(self) -> bytes:
        """As it is stored."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "ended"}).encode()

    @staticmethod
    def from_json(text: bytes) -> Page | None:
        """What `to_json` made; None: something else."""
        try:
            tree = json.loads(text)
            name, run_dir, address, key = (str(tree[told]) for told in ("name", "run_dir", "address", "key"))
            return Page(name, run_dir, address, key, str(tree.get("job", "")))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(frozen=True, slots=True)
class Shown:
    """What a run tells Ray of how it is shown.

    Args:
        page: for whoever looks from the cluster; None: there is none.
        link: of the page, for people on the driver's machine; "": there is none.
        proxy: of a server that the dashboard of a local Ray asks first; "": none.
        run: its name. run_dir: absolute.
    """

    page: Page | None = None
    link: str = ""
    proxy: str = ""
    run: str = ""
    run_dir: str = ""

    def metadata(self) -> dict[str, str]:
        """Of the job; a submitted one keeps what it was submitted with."""
        named = {"job_name": self.run, "ray_ep_run": self.run_dir, "ray_ep_page": self.link}
        return {key: text for key, text in named.items() if text}


NOT_SHOWN = Shown()
"""Of what no reader looks for, such as a probe."""


@contextmanager
def announced(shown: Shown) -> Iterator[str]:
    """Inside, with Ray joined: others find the page. Yields where Ray's dashboard has it, "" where it does not.

    Where Ray's head does not store it nobody finds it: that is logged.
    """
    stored: _Stored | None = None
    try:
        stored = None if shown.page is None else within(HEAD_S, partial(_store, shown.page))
    except Exception as e:  # each of Ray's transports has errors of its own
        log.warning("page not announced: %s", str(e).splitlines()[0])
    proxied = stored is not None and (stored.proxied or bool(shown.proxy)) and stored.dashboard
    try:
        yield f"http://{stored.dashboard}/ray_ep/{quote(stored.name)}/" if stored and proxied else ""
    finally:
        if stored is not None:
            with suppress(Exception):
                within(HEAD_S, partial(_withdraw, stored))


def pages(client: Any, timeout_s: float) -> dict[str, Page]:
    """By name, of all runs that have announced one and not withdrawn it; of a driver that was killed as `ended`.

    Args:
        client: a `ray._raylet.GcsClient`.
    """
    keys = client.internal_kv_keys(PAGES, NAMESPACE, timeout=timeout_s)
    found = client.internal_kv_multi_get(keys, NAMESPACE, timeout=timeout_s) if keys else {}
    read = {key[len(PAGES) :].decode(errors="replace"): Page.from_json(text) for key, text in found.items()}
    if not read:
        return {}
    brief = {"skip_submission_job_info_field": True, "skip_is_running_tasks_field": True}
    jobs = client.get_all_job_info(**brief, timeout=timeout_s)
    dead = {job.hex() for job, told in jobs.items() if told.is_dead}
    return {n: replace(page, ended=page.job in dead) for n, page in sorted(read.items()) if page is not None}


def named(page: Page, other: Page | None, job: str) -> Page:
    """The page under its run's name, or a longer one if another run has that; a resumed run takes its own again.

    Args:
        other: what is stored under the name. Another machine's is another run, though its directory is called the same.
    """
    if other is None or (other.run_dir, _host(other)) == (page.run_dir, _host(page)):
        return page
    return replace(page, name=f"{page.name}-{job}")


def _host(page: Page) -> str | None:
    return urlsplit(page.address).hostname


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is in Ray's store: a key with its text; whether a proxy says that it is there; the dashboard's address."""

    key: bytes
    text: bytes
    proxied: bool
    dashboard: str

    @property
    def name(self) -> str:
        return self.key[len(PAGES) :].decode()


def _store(page: Page) -> _Stored:
    """Under a name of its own."""
    import ray
    from ray._private.worker import get_dashboard_url
    from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_get, _internal_kv_put

    there = _internal_kv_get(PAGES + page.name.encode(), namespace=NAMESPACE)
    other = None if there is None else Page.from_json(there)
    job = ray.get_runtime_context().get_job_id()
    page = replace(named(page, other, job), job=job)
    key, text = PAGES + page.name.encode(), page.to_json()
    _internal_kv_put(key, text, overwrite=True, namespace=NAMESPACE)
    log.info("page run=%s address=%s", page.name, page.address)
    dashboard = get_dashboard_url()  # type: ignore[no-untyped-call]
    return _Stored(key, text, _internal_kv_exists(PROXY, namespace=NAMESPACE), str(dashboard or ""))


def _withdraw(stored: _Stored) -> None:
    """Unless the run was resumed elsewhere meanwhile."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

    if _internal_kv_get(stored.key, namespace=NAMESPACE) == stored.text:
        _internal_kv_del(stored.key, namespace=NAMESPACE)
