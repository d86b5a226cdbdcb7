"""The buttons of the run's page: calls of the control's service from within its process, under the same rights.

A press is a call as one over the network is: the same token opens, the same line is written into audit.jsonl.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message_factory import GetMessageClass

from ray_ep.config.sections.observing import ControlConfig
from ray_ep.control.audit import Entry
from ray_ep.control.service import SERVICE, Service

CALLS = ("Rebalance", "Pause", "Resume", "Checkpoint", "Stop", "Scale", "Drain")
"""What the page has buttons for."""
_ENDED = "The run has ended."
_SILENT = "No buttons now: the run's control listens once the ranks are ready; where it cannot, an event says why."


class Buttons:
    """What the page is given of a run's control, from before it listens until the run's end."""

    def __init__(self, cfg: ControlConfig):
        self.asks = bool(cfg.viewer_token_file or cfg.operator_token_file)
        self._never = ""
        if not cfg.enabled:
            self._never = "The run has no control (control.enabled=false)."
        if cfg.tls_client_ca:
            self._never = "The run is steered by who shows a certificate (control.tls_client_ca), which a page cannot."
        self._service: Service | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._own = ""

    def open(self, service: Service, own: str) -> None:
        """The control listens; called in its event loop.

        Args:
            own: the token that the run made for who may read its files.
        """
        self._service, self._loop, self._own = service, asyncio.get_running_loop(), own

    def close(self) -> None:
        """The run has ended."""
        self._service, self._never = None, self._never or _ENDED

    def shut(self) -> tuple[bool, str]:
        """Why nobody can press a button now, "" if they can; first: whether that is for good."""
        if self._never:
            return True, self._never
        return False, "" if self._service else _SILENT

    def press(self, call: str, message: Any, token: str, owner: bool, where: str) -> Future[tuple[str, str]]:
        """See observe.page.buttons; a caller who is the owner and shows no token is who may read the run's files."""
        service, loop = self._service, self._loop
        if service is None or loop is None:
            return _known(grpc.StatusCode.UNAVAILABLE, self.shut()[1])
        shown = token or (self._own if owner else "")
        asked = _answer(service, call, message, _Caller(shown, where))
        try:
            return asyncio.run_coroutine_threadsafe(asked, loop)
        except RuntimeError:  # the loop has ended meanwhile
            asked.close()
            return _known(grpc.StatusCode.UNAVAILABLE, _ENDED)

    def turned_away(self, call: str, where: str, words: str) -> None:
        """A press that was none of the page's: noted as every change that is refused."""
        service, loop = self._service, self._loop
        if service is not None and loop is not None and call in CALLS:
            code = grpc.StatusCode.PERMISSION_DENIED.name
            entry = Entry("", "", where, call, "", "", code, words[:1000], 0.0)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(service.audit.write, entry)


def _known(code: grpc.StatusCode, words: str) -> Future[tuple[str, str]]:
    told: Future[tuple[str, str]] = Future()
    told.set_result((code.name, words))
    return told


async def _answer(service: Service, call: str, message: Any, caller: _Caller) -> tuple[str, str]:
    if call not in CALLS:
        return grpc.StatusCode.UNIMPLEMENTED.name, f"{call!r}: the page has {', '.join(CALLS)}"
    method = SERVICE.methods_by_name[call]
    try:
        raw = ParseDict(message, GetMessageClass(method.input_type)()).SerializeToString()
    except (ParseError, AttributeError, TypeError, ValueError, RecursionError) as e:
        words = f"expected a {method.input_type.full_name} as JSON: {str(e) or type(e).__name__}"
        return grpc.StatusCode.INVALID_ARGUMENT.name, words[:500]
    try:
        answer = GetMessageClass(method.output_type).FromString(await service.called(method, raw, caller))
    except _RefusedError as e:
        return e.code.name, e.words
    return grpc.StatusCode.OK.name, answer.outcome.words  # type: ignore[attr-defined]


class _RefusedError(Exception):
    def __init__(self, code: grpc.StatusCode, words: str):
        super().__init__(words)
        self.code, self.words = code, words


class _Caller:
    """Of a press what grpc tells of a call: who calls, from where; and how it is refused."""

    def __init__(self, token: str, where: str):
        self._token, self._where = token, where

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return self._where

    async def abort(self, code: grpc.StatusCode, words: str) -> NoReturn:
        raise _RefusedError(code, words)
