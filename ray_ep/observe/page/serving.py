"""The page's server beside a run: in a thread with an event loop of its own, from the run's start to its end.

Whatever goes wrong with it is said in one sentence, and the run goes on without its page.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_ep.config.sections.observing import ObserveConfig

if TYPE_CHECKING:  # it imports aiohttp
    from ray_ep.observe.page.buttons import RunControl

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
"""Names of this machine that a browser on it may ask under."""
EVERY = ("0.0.0.0", "::")
"""Every address of this machine."""
_END_S = 5.0  # for answers that are under way


@dataclass(frozen=True, slots=True)
class Served:
    """Where the page is: its own address, and where a relay asks for it; "": nowhere."""

    address: str = ""
    relayed: str = ""


@contextmanager
def served(
    run_dir: Path,
    cfg: ObserveConfig,
    tell: Callable[[str], None],
    relay: tuple[str, str] | None = None,
    control: RunControl | None = None,
) -> Iterator[Served]:
    """Inside: the page of the run is served, and it is said where.

    Args:
        tell: told in one sentence why it is not served, unless the configuration says so.
        relay: an address of this machine on which it is served, too, on a free port, to those alone who send the key
            that is the second part of this (`server.KEY_HEADER`).
        control: what the page's buttons ask; None: it has none.
    """
    if not cfg.page:
        yield Served()
        return
    sockets: list[socket.socket] = []
    try:
        sockets.append(_bound(cfg.host, cfg.port))
        if relay is not None:
            sockets.append(_bound(relay[0], 0))
    except OSError as e:
        why = e.strerror or e
        if sockets:
            tell(f"the page cannot be relayed from here: {why}; it is at its own address alone")
        else:
            tell(f"observe.host={cfg.host!r} observe.port={cfg.port}: {why}: the run goes on without its page")
    if not sockets:
        yield Served()
        return
    urls = [_url(listening) for listening in sockets]
    key = relay[1] if relay and len(sockets) > 1 else ""
    names = {cfg.host, *LOOPBACK} | ({socket.gethostname(), socket.getfqdn()} if cfg.host in EVERY else set())
    thread = _Serving(run_dir, sockets, names, key, tell, control)
    thread.start()
    try:
        yield Served(f"{urls[0]}/ray_ep/", urls[1] if len(urls) > 1 else "")
    finally:
        thread.end()


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a run that has just ended
        listening.bind((host, port))
        listening.listen(64)
    except BaseException:
        listening.close()
        raise
    return listening


class _Serving(threading.Thread):
    """The thread; a daemon: it keeps no process alive."""

    def __init__(
        self, run_dir: Path, sockets: list[socket.socket], hosts: set[str], key: str, tell: Callable[[str], None],
        control: RunControl | None,
    ):  # fmt: skip
        super().__init__(name="ray_ep-page", daemon=True)
        self._run_dir, self._sockets, self._hosts, self._key, self._tell = run_dir, sockets, hosts, key, tell
        self._control = control
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()

    def run(self) -> None:
        """Serve until `end`."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as e:  # of any kind: a page is no reason to end a run
            self._tell(f"the page is not served any more: {type(e).__name__}: {e}; the run goes on")
        finally:
            for listening in self._sockets:
                listening.close()

    def end(self) -> None:
        """Have it end, and wait for that, at most for some seconds."""
        with suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._over.set)
        self.join(_END_S)

    async def _serve(self) -> None:
        from aiohttp import web  # takes a moment, which is this thread's

        from ray_ep.observe.page.server import PageServer
        from ray_ep.observe.state import RunState

        relayed = self._sockets[1].getsockname()[:2] if self._key else None
        server = PageServer(RunState(self._run_dir), self._hosts, relayed, self._key, self._control)
        runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        for listening in self._sockets:
            await web.SockSite(runner, listening).start()
        try:
            await self._over.wait()
        finally:
            await server.last_word()
            await runner.cleanup()
