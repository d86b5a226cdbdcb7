"""Ray's own dashboard with our server asked first: Ray's middleware before a handler that stands for the dashboard."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from ray.dashboard.http_server_head import HttpServerDashboardHead

from ray_ep.driver.actors.shown import Page
from ray_ep.observe.dashboard.proxy import Proxy

TOKEN = {"Authorization": "Bearer b34rer"}


async def rays_own(request):
    """What the dashboard answers itself."""
    return web.json_response({"path": request.path, "bytes": len(await request.read())})


@asynccontextmanager
async def server(handler):
    app = handler if isinstance(handler, web.Application) else web.Application()
    if app is not handler:
        app.router.add_route("*", "/{path:.*}", handler)
    running = TestServer(app, host="127.0.0.1")
    await running.start_server(access_log=None)
    try:
        yield f"http://127.0.0.1:{running.port}"
    finally:
        await running.close()


@asynccontextmanager
async def dashboard(first):
    """A client of a dashboard that asks the server at `first` before it answers."""
    head = object.__new__(HttpServerDashboardHead)
    head.proxy_server_url = first
    app = web.Application(middlewares=[head.proxy_server_middleware], client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", rays_own)
    async with TestClient(TestServer(app, host="127.0.0.1")) as client:
        yield client


@asynccontextmanager
async def shown(page, **limits):
    """The same with our server first, which knows a run whose page's server answers as `page` does."""
    async with server(page) as address:

        async def pages():
            return {"run-7": Page("run-7", "/runs/run-7", address)}

        async with server(Proxy(pages, **limits).app()) as first, dashboard(first) as client:
            yield client


async def experts(request):
    return web.Response(text="experts", content_type="text/html", headers={"ETag": '"1"'})


def test_the_page_is_at_the_dashboards_own_address_and_all_else_is_rays():
    async def main():
        async with shown(experts) as client:
            answer = await client.get("/ray_ep/run-7/", headers=TOKEN)
            assert (answer.status, await answer.text(), answer.content_type) == (200, "experts", "text/html")
            assert answer.headers["ETag"] == '"1"'
            for path in ("/api/version", "/static/js/main.js", "/logs/", "/api/ray_ep/run-7/stream"):
                assert (await (await client.get(path, headers=TOKEN)).json())["path"] == path

    asyncio.run(main())


@pytest.mark.parametrize("size", [0, 1000, 30_000_000])
def test_an_upload_reaches_ray_whole(size):
    async def main():
        async with shown(experts) as client:
            answer = await client.put("/api/packages/gcs/pkg.zip", data=b"x" * size, headers=TOKEN)
            assert (await answer.json())["bytes"] == size

    asyncio.run(main())


def test_without_our_server_the_dashboard_answers_as_always():
    async def main():
        async with dashboard("http://127.0.0.1:1") as client:
            assert (await (await client.get("/api/version")).json())["path"] == "/api/version"

    asyncio.run(main())


def test_while_a_page_hangs_the_dashboard_answers():
    hanging = []

    async def hang(request):
        hanging.append(1)
        await asyncio.Event().wait()

    async def main():
        async with shown(hang, total_s=1.0) as client:
            slow = asyncio.create_task(client.get("/ray_ep/run-7/"))
            while not hanging:
                await asyncio.sleep(0.01)
            for _ in range(5):
                assert (await client.get("/api/version")).status == 200
            assert not slow.done()
            assert (await slow).status == 504

    asyncio.run(main())
