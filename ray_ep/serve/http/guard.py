"""What stands before the server: an id of our own, keys, the size of a body, and clients that go away. ASGI alone.

A request that is left by its client is cancelled wherever it is; so ranks do not compute for nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from ray_ep.serve.http.keys import ApiKeys

log = logging.getLogger("ray_ep.serve")

OPEN = frozenset({"/health", "/ready"})
"""Paths that answer without a key: what looks after a server has none."""
ID_HEADER = b"x-request-id"
"""Where an answer tells its request's id. What a client sends there is not taken: two could be alike."""
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Gone(Exception):
    """The client has left before its request was whole."""


class _TooLarge(Exception):
    """A body over the limit."""


class Guard:
    """ASGI middleware, the outermost one.

    Args:
        keys: what opens the server; None: it is open. most_bytes: of a body.
    """

    def __init__(self, app: Any, keys: ApiKeys | None, most_bytes: int):
        self._app, self._keys, self._most = app, keys, most_bytes

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id, began = f"req-{uuid.uuid4().hex}", time.monotonic()
        answer = _Answer(send)
        try:
            await self._guarded(scope, id, receive, answer)
        finally:
            log.info(
                "request id=%s method=%s path=%s status=%s seconds=%.3f",
                id, scope["method"], json.dumps(scope["path"]), answer.status or "none", time.monotonic() - began,
            )  # fmt: skip

    async def _guarded(self, scope: dict[str, Any], id: str, receive: Receive, answer: _Answer) -> None:
        headers = scope["headers"]
        if self._keys is not None and scope["path"] not in OPEN and not self._keys.open(headers):
            await answer.refuse(id, 401, "no valid API key: send one as `Authorization: Bearer KEY`")
            return
        try:
            body = await self._body(headers, receive)
        except _TooLarge:
            await answer.refuse(id, 413, f"the body is too large: allowed are {self._most} bytes (serve.body_mb)")
            return
        except _Gone:
            return
        own = [(name, value) for name, value in headers if name != ID_HEADER] + [(ID_HEADER, id.encode())]
        await _until_gone(self._app, {**scope, "headers": own}, body, receive, answer)

    async def _body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        told = next((value for name, value in headers if name == b"content-length"), b"0")
        if told.isdigit() and int(told) > self._most:
            raise _TooLarge
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._most:
                raise _TooLarge
        return b"".join(parts)


class _Answer:
    """Sends on, and knows how far it is."""

    def __init__(self, send: Send):
        self._send = send
        self.status, self.whole = 0, False

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.whole |= message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, id: str, status: int, message: str) -> None:
        """An error as OpenAI words it."""
        kind = "authentication_error" if status == 401 else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(ID_HEADER, id.encode())] + [(b"www-authenticate", b"Bearer")] * (status == 401)
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


async def _until_gone(app: Any, scope: dict[str, Any], body: bytes, receive: Receive, answer: _Answer) -> None:
    """Run the application with a body that was read; cancel it when the client goes."""
    given, gone = False, asyncio.Event()

    async def read() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    work, watcher = asyncio.ensure_future(app(scope, read, answer)), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not answer.whole:
            work.cancel()
        await asyncio.wait({work})
    finally:
        for task in (work, watcher):
            task.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)
    if not work.cancelled():
        work.result()
