"""Who gets past the server's door: calls of the run are the service's, those of health and of description are here.

grpc prints on the terminal what it cannot read itself, and what it can answer nobody any more. Nothing of that is a
fault of the run's: messages are read here, and of callers who have gone `at_a_loss` says nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ray_ep.control.calls import Denied, only
from ray_ep.control.service import NO_TOKEN, SERVICE, Service

CHECKS = 16
"""Calls at once that ask without a token whether the server is healthy."""
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
"""The one call that needs no token."""

log = logging.getLogger("ray_ep.control")


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets nobody without a token past it but who asks whether the server is healthy."""

    def __init__(self, service: Service):
        self._service, self._checks = service, asyncio.Semaphore(CHECKS)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call; None: there is no such call."""
        if details.method.startswith(f"/{SERVICE.full_name}/"):  # the service looks itself, and keeps records
            return await continuation(details)
        known = self._service.knows(details.invocation_metadata)
        if not known and details.method != HEALTH_CHECK:
            return grpc.stream_unary_rpc_method_handler(self._refuse)
        handler = await continuation(details)
        if handler is None:
            return None
        answers = partial(self._answers, handler, known)
        return grpc.stream_stream_rpc_method_handler(answers, response_serializer=handler.response_serializer)

    @staticmethod
    async def _refuse(messages: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN)

    async def _answers(self, handler: Any, known: bool, raw: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        """Those of a handler whose messages are read here."""
        try:
            if not known and self._checks.locked():
                words = "too many ask without a token: ask later"
                raise Denied(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
            async with nullcontext() if known else self._checks:
                messages = _read(handler.request_deserializer, raw)
                if handler.request_streaming:
                    async for answer in handler.stream_stream(messages, context):
                        yield answer
                elif handler.response_streaming:
                    await handler.unary_stream(await only(messages), context)
                else:
                    yield await handler.unary_unary(await only(messages), context)
        except Denied as e:
            await context.abort(e.code, e.words)


async def _read(parse: Any, raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """Messages from their bytes. Raises Denied."""
    async for message in raw:
        try:
            yield parse(message)
        except DecodeError:
            raise Denied(grpc.StatusCode.INVALID_ARGUMENT, "expected another kind of message") from None


def at_a_loss(loop: asyncio.AbstractEventLoop, trouble: dict[str, Any]) -> None:
    """An event loop's exception handler: a caller who went while being answered is no trouble."""
    if isinstance(trouble.get("exception"), grpc.aio.InternalError):
        log.debug("control caller gone: %s", trouble["exception"])
    else:
        loop.default_exception_handler(trouble)
