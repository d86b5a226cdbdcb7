"""The page's server: an aiohttp application over the state of one run. It only reads, and answers only who may ask.

    GET /ray_ep/                        the page
    GET /ray_ep/assets/NAME             its modules, style sheet and chart library
    GET /api/ray_ep/state?since=N&mark=M  the run's state: parts that have changed since version N, of its steps those
                                        after mark M (observe/state)
    GET /api/ray_ep/summary             what is said of it in words (summary.py)
    GET /api/ray_ep/placements?after=V  placements newer than V (data.py)
    GET /api/ray_ep/layers/L            co-activation and transitions of one layer (data.py)
    GET /api/ray_ep/stream              server-sent events: `state` with the version, when there is a new one
    /api/ray_ep/control                 the page's buttons (buttons.py)

Who asks under another name than this server's, or from another site's page, gets nothing: a foreign page can neither
read the run nor reach it by a name of its own (DNS rebinding). Nothing is looked at while nobody asks.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ray_ep.observe.page.assets import FOLDER, library, modules
from ray_ep.observe.page.buttons import Buttons, RunControl
from ray_ep.observe.page.data import History, layer
from ray_ep.observe.page.html import as_json, served_page
from ray_ep.observe.page.summary import summary
from ray_ep.observe.state import RunState

LOOK_S = 1.0
"""Seconds between two looks at the run directory while somebody watches."""
KEY_HEADER = "X-Ray-Ep-Key"
"""What a relay sends to show that it is the run's own."""
WATCHERS = 64
"""Streams that are open at the same time; who comes then asks every few seconds instead."""
MOST_BYTES = 16 << 10
"""Of what a browser sends."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PageServer:
    """The answers. One thread of its own reads files and makes JSON, so that the loop always answers.

    Args:
        hosts: names under which it may be asked, as in a Host header without its port.
        relayed: address and port at which only those are answered who send `key`.
        control: of the run, for the page's buttons; None: it has none.
    """

    def __init__(
        self, state: RunState, hosts: Collection[str], relayed: tuple[str, int] | None = None, key: str = "",
        control: RunControl | None = None,
    ):  # fmt: skip
        self.state, self._hosts = state, frozenset(h.lower() for h in hosts)
        self._relayed, self._key, self._buttons = relayed, key.encode(), Buttons(control, self._of_relay)
        self._history = History(state)  # for the pool's one thread
        self._looked = 0.0
        self._changed = asyncio.Event()
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None
        self._kept: dict[tuple[Any, ...], bytes] = {}  # answers of the present version
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ray_ep-page")

    def application(self) -> web.Application:
        """The application; its loop is the one that runs now."""
        app = web.Application(middlewares=[self._guard], client_max_size=MOST_BYTES)
        get = app.router.add_get
        get("/ray_ep", self._redirect)
        get("/ray_ep/", self._page)
        get("/ray_ep/assets/{name}", self._asset)
        get("/api/ray_ep/state", self._state)
        get("/api/ray_ep/summary", self._summary)
        get("/api/ray_ep/placements", self._placements)
        get("/api/ray_ep/layers/{layer}", self._layer)
        get("/api/ray_ep/stream", self._stream)
        self._buttons.add(app)
        app.on_shutdown.append(self._shut)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        host = (request.headers.get("Host") or "").lower()
        site, origin = request.headers.get("Sec-Fetch-Site", "none"), request.headers.get("Origin")
        visit = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method == "GET"  # by a link to here
        foreign = (site not in ("none", "same-origin") and not visit) or (
            origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}")
        )
        if self._of_relay(request):
            known = hmac.compare_digest(request.headers.get(KEY_HEADER, "").encode(), self._key)
        else:
            known = self._named(request, host)
        if not known or foreign:
            self._buttons.turned_away(request, f"from another site: Host {host[:200]!r}, Origin {origin!r:.200}")
            raise web.HTTPForbidden(text="not for you\n")
        response = await handler(request)
        if not response.prepared:
            for key, value in _HEADERS.items():
                response.headers.setdefault(key, value)
        return response

    def _named(self, request: web.Request, host: str) -> bool:
        """Whether a Host header names this server; an address that the request came to does: no name leads there."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        here = None if request.transport is None else request.transport.get_extra_info("sockname")
        return name in self._hosts or (here is not None and name.strip("[]") == here[0])

    def _of_relay(self, request: web.Request) -> bool:
        transport = request.transport
        here = None if transport is None else transport.get_extra_info("sockname")
        return self._relayed is not None and here is not None and tuple(here[:2]) == tuple(self._relayed)

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/ray_ep/")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        text, policy = served_page(self.state.path.resolve().name)
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        path = {**modules(), **library(), "page.css": FOLDER / "page.css"}.get(name)
        if path is None:
            raise web.HTTPNotFound(text=f"no asset {name!r}\n")
        return web.FileResponse(
            path, headers={"Content-Type": "text/css" if path.suffix == ".css" else "text/javascript"}
        )

    async def _state(self, request: web.Request) -> web.StreamResponse:
        since, mark = max(_whole(request, "since", 0), 0), request.query.get("mark", "")[:64]
        return await self._json(("state", since, mark), lambda: self.state.snapshot(since=since, mark=mark))

    async def _summary(self, request: web.Request) -> web.StreamResponse:
        return await self._json(("summary",), lambda: summary(self.state, running=True))

    async def _placements(self, request: web.Request) -> web.StreamResponse:
        after = _whole(request, "after", -1)
        return await self._json(("placements", after), lambda: self._history.after(after))

    async def _layer(self, request: web.Request) -> web.StreamResponse:
        number = request.match_info["layer"]
        if not (number.isascii() and number.isdigit() and len(number) < 7):
            raise web.HTTPBadRequest(text=f"layers/{number!r}: allowed is the number of a MoE layer, from 0\n")
        return await self._json(("layer", number), lambda: layer(self.state, int(number)))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self._watchers >= WATCHERS:
            raise web.HTTPServiceUnavailable(text=f"{WATCHERS} watch already\n")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **_HEADERS})
        await response.prepare(request)
        self._watchers += 1
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look_on())
        try:
            while True:
                told = f"event: state\ndata: {self.state.version}\n\n"
                await response.write(told.encode())
                changed = self._changed
                try:
                    await asyncio.wait_for(changed.wait(), 20 * LOOK_S)  # or say that this is still there
                except (TimeoutError, asyncio.TimeoutError):
                    continue
        except (ConnectionError, asyncio.CancelledError):
            return response
        finally:
            self._watchers -= 1

    async def _look_on(self) -> None:
        """Look at the run while anybody watches."""
        while self._watchers:
            await asyncio.sleep(LOOK_S)
            await self._look()
        self._looking = None

    async def last_word(self) -> None:
        """Have those who watch see how the run ended; then there is no more to see."""
        if self._watchers:
            self._looked = -LOOK_S
            await self._look()
            await asyncio.sleep(LOOK_S)  # they ask for it

    async def _look(self) -> None:
        """Read what is new, at most once in LOOK_S."""
        if time.monotonic() - self._looked < 0.5 * LOOK_S:
            return
        self._looked = time.monotonic()
        if await asyncio.get_running_loop().run_in_executor(self._pool, self.state.refresh):
            self._kept.clear()
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def _json(self, key: tuple[Any, ...], make: Callable[[], Any]) -> web.StreamResponse:
        """Make an answer once for all who ask for it while nothing changes."""
        await self._look()
        key = (*key, self.state.version)
        body = self._kept.get(key)
        if body is None:
            body = await asyncio.get_running_loop().run_in_executor(self._pool, lambda: as_json(make()).encode())
            if len(self._kept) < 64:
                self._kept[key] = body
        response = web.Response(body=body, content_type="application/json")
        if len(body) > 1 << 20:
            response.enable_compression()
        return response

    async def _shut(self, app: web.Application) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _whole(request: web.Request, name: str, default: int) -> int:
    """A number of the query; raises HTTPBadRequest."""
    text = request.query.get(name, str(default))
    try:
        return int(text[:12])
    except ValueError:
        raise web.HTTPBadRequest(text=f"{name}={text!r}: allowed is a whole number\n") from None
