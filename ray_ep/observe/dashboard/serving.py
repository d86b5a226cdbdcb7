"""The proxy as a server: in a thread beside a run, for the dashboard of its Ray, or as a process on a cluster's head.

On loopback alone, for the dashboard hands it every reader's token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from aiohttp import web

from ray_ep.errors import BadInput
from ray_ep.observe.dashboard.found import Found, HeadSilentError, of_cluster
from ray_ep.observe.dashboard.proxy import Proxy

HOST = "127.0.0.1"
"""Where it listens."""
_ENDS_S = 1.0  # for requests that are under way
_MOST_PAUSE_S = 15.0  # between two questions to a head that is not there: each leaves a line of Ray's on stderr


@contextmanager
def beside(proxy: Proxy) -> Iterator[str]:
    """Inside: served at the address that is yielded."""
    loop, address, end = asyncio.new_event_loop(), Future[str](), asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(proxy.app(), access_log=None, shutdown_timeout=_ENDS_S)
        try:
            await runner.setup()
            await web.TCPSite(runner, HOST, 0).start()
            address.set_result(f"http://{HOST}:{runner.addresses[0][1]}")
            await end.wait()
        except BaseException as e:
            with suppress(Exception):
                address.set_exception(e)
            raise
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="ray_ep-proxy", daemon=True)
    thread.start()
    try:
        yield address.result()
    finally:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end.set)
        thread.join(2 * _ENDS_S)


def serve(port: int, address: str) -> None:
    """Serve the pages of the cluster whose head is at HOST:PORT `address`, until SIGINT or SIGTERM.

    The head need not be there yet: the server has to be there before it.

    Raises:
        BadInput: something else listens at the port.
    """
    found = Found(of_cluster(address))

    async def look_early(app: web.Application) -> AsyncIterator[None]:
        looking = asyncio.create_task(_until_found(found))
        yield
        looking.cancel()

    app = Proxy(found).app()
    app.cleanup_ctx.append(look_early)
    try:
        web.run_app(app, host=HOST, port=port, access_log=None, print=None, shutdown_timeout=_ENDS_S)
    except OSError as e:
        raise BadInput(f"--port={port}: cannot listen there: {e.strerror or e}") from None


async def _until_found(found: Found) -> None:
    """Ask until the head answers, more and more seldom: that is when it learns of this server."""
    pause_s = 1.0
    while not found.answered:
        with suppress(HeadSilentError):
            await found()
        await asyncio.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _MOST_PAUSE_S)
