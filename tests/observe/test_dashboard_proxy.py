"""What Ray's dashboard asks first: ours is relayed, the rest is refused at once, a reader's token goes nowhere."""

import asyncio
import logging
import threading
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from ray_ep.driver.actors.shown import KEY, Page, named
from ray_ep.observe.dashboard import found, proxy
from ray_ep.observe.dashboard.found import Found, HeadSilentError
from ray_ep.observe.dashboard.proxy import Proxy

TOKEN = "b34rer-t0ken"
OTHERS = ("/api/version", "/static/js/main.js", "/ray_epic/", "/api/ray_epic", "/api/jobs/", "/logs", "/favicon.ico")


@asynccontextmanager
async def served(app):
    """A server that others reach by its address."""
    server = TestServer(app, host="127.0.0.1")
    await server.start_server(access_log=None)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def proxied(answer=None, name="run-7", **limits):
    """A run's page behind the proxy: its client, what the page was asked, how often pages were looked up."""
    it = SimpleNamespace(asked=[], looked=0)

    async def page(request):
        it.asked.append(request)
        return await answer(request) if answer else web.Response(text="experts", headers={"ETag": '"7"'})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", page)
    async with served(app) as server:
        address = f"http://127.0.0.1:{server.port}"

        async def pages():
            it.looked += 1
            return {name: Page(name, f"/runs/{name}", address, "s3cret")}

        async with TestClient(TestServer(Proxy(pages, **limits).app(), host="127.0.0.1")) as it.client:
            yield it


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_what_is_not_ours_is_a_404_without_a_look_at_anything(path, method):
    async def main():
        async with proxied() as it:
            answer = await it.client.request(method, path)
            assert (answer.status, await answer.read()) == (404, b"")
            assert (it.looked, it.asked) == (0, [])

    asyncio.run(main())


def test_an_upload_to_the_dashboard_is_refused_while_its_body_is_still_on_its_way():
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b"x" * 65536
            await asyncio.sleep(0.001)

    async def main():
        async with proxied() as it:
            answer = await it.client.put("/api/packages/gcs/pkg.zip", data=endless())
            assert answer.status == 404
            answer.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_page_of_a_run_is_relayed_below_its_name():
    async def main():
        async with proxied() as it:
            for path, asked in [
                ("/ray_ep/run-7/", "/ray_ep/"),
                ("/ray_ep/run-7/assets/app.js", "/ray_ep/assets/app.js"),
                ("/api/ray_ep/run-7/state?since=3&mark=1/2", "/api/ray_ep/state?since=3&mark=1/2"),
            ]:
                answer = await it.client.get(path)
                assert (answer.status, await answer.text()) == (200, "experts")
                assert answer.headers["ETag"] == '"7"'
                assert it.asked.pop().path_qs == asked

    asyncio.run(main())


def test_what_the_reader_has_already_is_not_sent_again():
    async def unless_known(request):
        return web.Response(status=304 if request.headers.get("If-None-Match") == '"7"' else 200)

    async def main():
        async with proxied(unless_known) as it:
            assert (await it.client.get("/ray_ep/run-7/", headers={"If-None-Match": '"7"'})).status == 304

    asyncio.run(main())


def test_a_token_is_neither_passed_on_nor_logged_and_no_cookie_comes_back(caplog):
    async def with_cookie(request):
        answer = web.Response(text="experts")
        answer.set_cookie("mine", "x")
        return answer

    async def main():
        async with proxied(with_cookie) as it:
            secret = {"Authorization": f"Bearer {TOKEN}", "Cookie": f"ray-authentication-token={TOKEN}", "X-Ray": TOKEN}
            for path in ("/ray_ep/run-7/", "/api/version", "/ray_ep/gone/", "/"):
                answer = await it.client.get(path, headers=secret)
                assert "Set-Cookie" not in answer.headers
            (asked,) = it.asked
            assert TOKEN not in str(dict(asked.headers))
            assert asked.headers[KEY] == "s3cret"

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert TOKEN not in caplog.text


def test_only_reading_is_relayed():
    async def main():
        async with proxied() as it:
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                answer = await it.client.request(method, "/api/ray_ep/run-7/state")
                assert (answer.status, answer.headers["Allow"]) == (405, "GET")
            assert it.asked == []

    asyncio.run(main())


def test_a_stream_of_events_is_refused_at_once_for_ray_would_wait_for_its_end():
    async def main():
        async with proxied() as it:
            assert (await it.client.get("/api/ray_ep/run-7/stream")).status == 404
            assert it.asked == []

    asyncio.run(main())


def test_a_page_that_hangs_is_given_up_and_holds_up_nobody_else():
    async def hang(request):
        await asyncio.Event().wait()

    async def main():
        async with proxied(hang, total_s=0.5) as it:
            slow = asyncio.create_task(it.client.get("/ray_ep/run-7/"))
            while not it.asked:
                await asyncio.sleep(0.01)
            assert (await it.client.get("/api/version")).status == 404
            assert not slow.done()
            answer = await slow
            assert answer.status == 504
            assert "run run-7 did not answer within 0.5 s" in await answer.text()

    asyncio.run(main())


def test_a_page_that_is_not_there_is_said_in_a_sentence():
    async def main():
        async def pages():
            return {"run-7": Page("run-7", "/runs/run-7", "http://127.0.0.1:1")}

        async with TestClient(TestServer(Proxy(pages).app(), host="127.0.0.1")) as client:
            answer = await client.get("/ray_ep/run-7/")
            assert answer.status == 502
            assert "the run has ended, or failed" in await answer.text()

    asyncio.run(main())


def test_a_run_that_nobody_knows_is_said_in_a_sentence_with_its_name_escaped():
    async def main():
        async with proxied() as it:
            answer = await it.client.get("/ray_ep/%3Cscript%3Ealert(1)%3C%2Fscript%3E/")
            text = await answer.text()
            assert answer.status == 410
            assert "<script>" not in text
            assert "&lt;script&gt;" in text

    asyncio.run(main())


def test_what_is_too_large_or_leads_elsewhere_is_not_passed_on(monkeypatch):
    monkeypatch.setattr(proxy, "MOST_BYTES", 1000)

    async def odd(request):
        if request.path.endswith("large"):
            return web.Response(body=b"x" * 1001)
        raise web.HTTPFound("http://elsewhere/")

    async def main():
        async with proxied(odd) as it:
            for path in ("/ray_ep/run-7/large", "/ray_ep/run-7/away"):
                assert (await it.client.get(path, allow_redirects=False)).status == 502

    asyncio.run(main())


def test_a_foreign_name_for_this_machine_gets_nothing():
    async def main():
        async with proxied() as it:
            answer = await it.client.get("/ray_ep/run-7/", headers={"Host": "evil.example:8264"})
            assert answer.status == 403
            assert it.asked == []

    asyncio.run(main())


def test_the_runs_are_listed_and_addresses_without_a_slash_lead_on_without_a_redirect():
    async def main():
        async with proxied(name="a run & more") as it:
            text = await (await it.client.get("/ray_ep/")).text()
            assert '<a href="a%20run%20%26%20more/">a run &amp; more</a> <small>/runs/a run &amp; more</small>' in text
            runs = await (await it.client.get("/api/ray_ep/")).json()
            assert runs == {"runs": [{"name": "a run & more", "run_dir": "/runs/a run & more", "ended": False}]}
            for path, to in (("/ray_ep", "ray_ep/"), ("/ray_ep/a%20run%20%26%20more", "a%20run%20%26%20more/")):
                answer = await it.client.get(path)
                assert answer.status == 200
                assert f"url={to}" in await answer.text()

    asyncio.run(main())


def test_the_first_page_of_the_dashboard_is_rays_own_with_one_script_more():
    async def main():
        async with proxied() as it:
            answer = await it.client.get("/")
            text = await answer.text()
            assert answer.content_type == "text/html"
            assert text.count("<script>") == 1
            assert "ray_ep/" in text
            assert '<div id="root"></div>' in text

    asyncio.run(main())


def test_an_answer_of_rays_head_that_does_not_come_is_not_waited_for_and_asked_for_once(monkeypatch):
    monkeypatch.setattr(found, "ANSWER_S", 0.1)
    go, asked, page = threading.Event(), [], Page("run-7", "/runs/run-7", "http://127.0.0.1:1")

    def ask():
        asked.append(1)
        go.wait(120)
        return {"run-7": page}

    async def main():
        look = Found(ask)
        for _ in range(2):
            with pytest.raises(HeadSilentError, match=r"no answer within 0\.1 s"):
                await look()
        assert len(asked) == 1
        go.set()
        while not look.answered:
            with suppress(HeadSilentError):
                await look()
        assert await look() == {"run-7": page}

    asyncio.run(main())


def test_what_runs_announced_is_used_again_for_a_moment_and_kept_when_the_head_refuses():
    now, asked, page = [0.0], [], Page("run-7", "/runs/run-7", "http://127.0.0.1:1")

    def ask():
        asked.append(1)
        if len(asked) > 1:
            raise ConnectionError("the head is away")
        return {"run-7": page}

    async def main():
        look = Found(ask, lambda: now[0])
        assert [await look(), await look()] == [{"run-7": page}] * 2
        assert len(asked) == 1
        now[0] = 5.0
        assert await look() == {"run-7": page}
        assert len(asked) == 2

    asyncio.run(main())


def test_a_head_that_refuses_is_told_of_in_its_words_and_logged_once(caplog):
    def ask():
        raise ConnectionError("InvalidAuthToken: <token> is missing\nand more")

    async def main():
        async with TestClient(TestServer(Proxy(Found(ask)).app(), host="127.0.0.1")) as client:
            for path in ("/ray_ep/", "/ray_ep/run-7/", "/api/ray_ep/"):
                answer = await client.get(path)
                assert answer.status == 503
                assert "the pages of runs: InvalidAuthToken: &lt;token&gt; is missing</p>" in await answer.text()
            assert (await client.get("/api/version")).status == 404

    asyncio.run(main())
    assert [r.getMessage() for r in caplog.records if r.name.startswith("ray_ep")] == [
        "Ray's head does not answer: InvalidAuthToken: <token> is missing"
    ]


def test_a_page_is_read_as_it_was_stored_and_anything_else_is_none():
    page = Page("run-7", "/runs/run-7", "http://10.0.0.1:4321", "key")
    assert Page.from_json(page.to_json()) == page
    assert Page.from_json(b"{}") is Page.from_json(b"nonsense") is Page.from_json(b"[1]") is None


def test_a_run_whose_driver_is_gone_is_listed_as_ended_without_a_link_and_is_not_asked():
    async def main():
        async def pages():
            return {"run-7": Page("run-7", "/runs/7 & 8", "http://127.0.0.1:1", job="02000000", ended=True)}

        async with TestClient(TestServer(Proxy(pages).app(), host="127.0.0.1")) as client:
            text = await (await client.get("/ray_ep/")).text()
            assert "<li>run-7 <small>/runs/7 &amp; 8: ended, for its driver is gone" in text
            assert (await (await client.get("/api/ray_ep/")).json())["runs"][0]["ended"] is True
            answer = await client.get("/ray_ep/run-7/")
            assert answer.status == 410
            assert "run run-7 in /runs/7 &amp; 8 has ended" in await answer.text()

    asyncio.run(main())


def test_a_name_that_another_run_has_is_made_longer_and_a_resumed_run_takes_its_own_again():
    page = Page("run", "/data/run", "http://10.0.0.1:4321", "key")
    assert named(page, None, "07") is page
    assert named(page, Page("run", "/data/run", "http://10.0.0.1:99", "old"), "07") is page
    for other in (Page("run", "/else/run", "http://10.0.0.1:99"), Page("run", "/data/run", "http://10.0.0.2:99")):
        assert named(page, other, "07").name == "run-07"
