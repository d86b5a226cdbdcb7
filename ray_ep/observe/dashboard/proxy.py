"""What Ray's dashboard asks first (`ray start --head --proxy-server-url`): it has the pages of runs, and nothing else.

Every request for the dashboard comes here before Ray sees it, with the reader's token, and Ray takes it on after a 404.
So a 404 is answered at once, without a look at anything; tokens go nowhere; a page's server has a short time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from urllib.parse import quote

import aiohttp
from aiohttp import web

from ray_ep.driver.actors.shown import KEY, Page
from ray_ep.observe.dashboard.found import HeadSilentError
from ray_ep.observe.dashboard.index import ENDED, LINK, moved, ray_index, refusal, runs_page, with_link

PATHS = ("ray_ep", "api/ray_ep")
"""What is ours, below the dashboard's address."""
CONNECT_S, TOTAL_S = 1.0, 5.0
"""For a page's server: to be reached, and to have answered whole."""
MOST_BYTES = 64 << 20
"""Of an answer: Ray's dashboard holds it in memory."""

_SENT = ("Accept", "Accept-Language", "If-None-Match", "If-Modified-Since")  # never Authorization nor Cookie
_RETURNED = (
    "Cache-Control",
    "Content-Security-Policy",
    "Content-Type",
    "ETag",
    "Last-Modified",
    "Referrer-Policy",
    "X-Content-Type-Options",
)
_HERE = ("127.0.0.1", "localhost", "::1")
_STREAM = "stream"  # of events: Ray would wait for its end
_NO_STORE = {"Cache-Control": "no-store"}

Pages = Callable[[], Awaitable[Mapping[str, Page]]]


class Proxy:
    """One server for all runs of a cluster.

    Args:
        pages: of the runs, by name.
        connect_s, total_s: see CONNECT_S.
    """

    def __init__(self, pages: Pages, connect_s: float = CONNECT_S, total_s: float = TOTAL_S):
        self._pages = pages
        self._limit = aiohttp.ClientTimeout(total=total_s, sock_connect=connect_s)
        self._session: aiohttp.ClientSession | None = None
        self._index = _index()

    def app(self) -> web.Application:
        """The server's application; it logs no request, for requests carry tokens."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        app.cleanup_ctx.append(self._with_session)
        return app

    async def _with_session(self, app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            timeout=self._limit, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as self._session:
            yield

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.lstrip("/")
        if path == "" and request.method == "GET" and self._index:
            return _html(self._index)
        ours = next((p for p in PATHS if path == p or path.startswith(f"{p}/")), None)
        if ours is None:
            return web.Response(status=404)
        if request.url.host not in _HERE:  # a page elsewhere that has its own name point to this machine
            return web.Response(status=403)
        if request.method != "GET":
            return web.Response(status=405, headers={"Allow": "GET"})
        name, slash, rest = path[len(ours) + 1 :].partition("/")
        if path == ours:
            return _html(moved(f"{ours.rpartition('/')[2]}/"))
        try:
            pages = await self._pages()
        except HeadSilentError as e:
            return _html(refusal(f"Ray's head does not answer the server that has the pages of runs: {e}"), 503)
        if not name:
            return self._runs(ours, pages)
        if name in pages and pages[name].ended:
            return _html(refusal(f"run {name} in {pages[name].run_dir} has {ENDED}"), 410)
        if name not in pages:
            return _html(refusal(f"no run {name} shows itself on this cluster: it has ended, or has no page"), 410)
        if not slash:
            return _html(moved(f"{quote(name)}/"))
        if rest.rpartition("/")[2] == _STREAM:
            return web.Response(status=404)
        return await self._relayed(request, pages[name], f"{ours}/{rest}")

    def _runs(self, ours: str, pages: Mapping[str, Page]) -> web.Response:
        if ours != PATHS[0]:
            told = [{"name": n, "run_dir": p.run_dir, "ended": p.ended} for n, p in pages.items()]
            return web.json_response({"runs": told})
        return _html(runs_page(pages))

    async def _relayed(self, request: web.Request, page: Page, path: str) -> web.Response:
        """What the page's server answers; a sentence where it does not."""
        assert self._session is not None
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        headers |= {"Accept-Encoding": "identity", "Via": "1.1 ray_ep"} | ({KEY: page.key} if page.key else {})
        query = f"?{raw}" if (raw := request.rel_url.raw_query_string) else ""
        try:
            async with self._session.get(
                f"{page.address}/{quote(path)}{query}", headers=headers, allow_redirects=False
            ) as answer:
                body = await answer.content.read(MOST_BYTES + 1)
                while len(body) <= MOST_BYTES and (more := await answer.content.read(MOST_BYTES)):
                    body += more
                if len(body) > MOST_BYTES or (answer.status in range(300, 400) and answer.status != 304):
                    return _html(refusal(f"run {page.name} answered with what cannot be passed on"), 502)
                kept = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
                return web.Response(status=answer.status, body=body, headers=kept)
        except asyncio.TimeoutError:
            limit = f"within {self._limit.total:g} s"
            return _html(refusal(f"the page's server of run {page.name} did not answer {limit}: look again later"), 504)
        except (aiohttp.ClientError, OSError):
            return _html(
                refusal(f"the page's server of run {page.name} is not there: the run has ended, or failed"), 502
            )


def _index() -> str:
    """Ray's first page with our link; "": it is left to Ray."""
    path = ray_index()
    try:
        return "" if path is None else with_link(path.read_text(encoding="utf-8"), LINK.read_text(encoding="utf-8"))
    except OSError:
        return ""


def _html(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="text/html", headers=_NO_STORE)
