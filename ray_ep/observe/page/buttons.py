"""The buttons of the page: changes of the run that a reader asks for, handed to the run's control.

    GET  /api/ray_ep/control        whether this reader has buttons, and the key of this process
    POST /api/ray_ep/control/NAME   a call of control.proto; its message as JSON, answered {code, words}

A press is taken from the page itself alone: with the key, which no other site can read; from the origin of the page; as
JSON, which no form sends; over loopback, for the page is not encrypted; from no relay, for that knows its readers by
other rights. There is no cookie: a browser sends nothing by itself that opens. Who may is the control's to say.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from aiohttp import web

from ray_ep.observe.page.peer import on_loopback, user_of

PRESS_HEADER = "X-Ray-Ep-Press"
"""What the page sends with a press: the key of this process."""

_PATH = "/api/ray_ep/control"
_ELSEWHERE = (
    "From here the run is only looked at: buttons are on the page at its own address, opened on the driver's machine "
    "or through ssh -L."
)
_RELAYS = ("Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")
_BEARER = "bearer "


class RunControl(Protocol):
    """What a run's control is to its page; any thread may ask it.

    Attributes:
        asks: it wants a token from everybody, from this machine's user, too.
    """

    asks: bool

    def shut(self) -> tuple[bool, str]:
        """Why nobody can press a button now, "" if they can; first: whether that is for good."""

    def press(self, call: str, message: Any, token: str, owner: bool, where: str) -> Future[tuple[str, str]]:
        """Have the service do a call.

        Args:
            message: of the call, as JSON has it. token: that was shown; "": none.
            owner: the caller is the user whose run this is. where: the caller is.

        Returns:
            Name of the status code, and a sentence.
        """

    def turned_away(self, call: str, where: str, words: str) -> None:
        """Somebody tried to press from where nobody may."""


class Buttons:
    """The two addresses.

    Args:
        control: None: the page has no buttons. relayed: whether a request came from the relay.
    """

    def __init__(self, control: RunControl | None, relayed: Callable[[web.Request], bool]):
        self._control, self._relayed, self._key = control, relayed, secrets.token_urlsafe(32)

    def add(self, app: web.Application) -> None:
        """Serve them."""
        app.router.add_get(_PATH, self._standing)
        app.router.add_post(f"{_PATH}/{{call}}", self._press)

    def turned_away(self, request: web.Request, why: str) -> None:
        """A press, if it is one, does not get as far as the control, which notes it."""
        call = request.path.removeprefix(f"{_PATH}/")
        if self._control is not None and request.method == "POST" and call != request.path:
            self._control.turned_away(call[:64], _where(request), why)

    async def _standing(self, request: web.Request) -> web.StreamResponse:
        closed, why = self._closed(request)
        told = {"closed": closed, "why": why, "key": "" if closed or why else self._key}
        token = not closed and not why and not self._owner(request)
        return web.json_response({**told, "token": token}, headers={"Cache-Control": "no-store"})

    async def _press(self, request: web.Request) -> web.StreamResponse:
        closed, why = self._closed(request)
        why = why or ("the page has no buttons" if closed else _foreign(request))
        if not why and not hmac.compare_digest(request.headers.get(PRESS_HEADER, "").encode(), self._key.encode()):
            why = "the page is of an earlier run: load it again"
        if why:
            self.turned_away(request, why)
            raise web.HTTPForbidden(text=f"{why}\n")
        try:
            message = await request.json()
        except (ValueError, RecursionError):
            raise web.HTTPBadRequest(text="expected JSON\n") from None
        shown = request.headers.get("Authorization", "")
        token = shown[len(_BEARER) :].strip() if shown.lower().startswith(_BEARER) else ""
        call = request.match_info["call"]
        assert self._control is not None  # else it is closed
        pressed = self._control.press(call, message, token, self._owner(request), _where(request))
        code, words = await asyncio.wrap_future(pressed)
        return web.json_response({"code": code, "words": words}, headers={"Cache-Control": "no-store"})

    def _closed(self, request: web.Request) -> tuple[bool, str]:
        """Why this reader has no buttons, and whether that is for good."""
        if self._control is None:
            return True, ""
        relayed = self._relayed(request) or any(name in request.headers for name in _RELAYS)
        if relayed or not on_loopback(*_ends(request)):
            return True, _ELSEWHERE
        return self._control.shut()

    def _owner(self, request: web.Request) -> bool:
        return self._control is not None and not self._control.asks and user_of(*_ends(request)) == os.geteuid()


def _foreign(request: web.Request) -> str:
    """Why a request is none of the page's own; "": it is."""
    origin = request.headers.get("Origin", "").lower()
    if origin != f"http://{request.headers.get('Host', '').lower()}":
        return f"not from the page: Origin {origin[:200]!r}"
    if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        return "not from the page"
    return "" if request.content_type == "application/json" else "not from the page: expected JSON"


def _ends(request: web.Request) -> tuple[Any, Any]:
    """Addresses of the other end of the connection and of this one."""
    if request.transport is None:
        return (), ()
    return request.transport.get_extra_info("peername") or (), request.transport.get_extra_info("sockname") or ()


def _where(request: web.Request) -> str:
    peer, _ = _ends(request)
    return f"page, {peer[0]}:{peer[1]}" if len(peer) > 1 else "page"
