"""The ASGI application: transformers' own server with our answers behind its paths, and what it lacks around them.

Off are its paths that load models, forget them, or answer by others than our ranks.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ray_ep.serve.http.admission import Refused
from ray_ep.serve.http.bodies import printable
from ray_ep.serve.http.chat import Chat
from ray_ep.serve.http.completion import Completions
from ray_ep.serve.http.description import describe
from ray_ep.serve.http.desk import Desk, Unanswered
from ray_ep.serve.http.events import error
from ray_ep.serve.http.guard import Guard
from ray_ep.serve.http.keys import ApiKeys
from ray_ep.serve.http.served import Served

log = logging.getLogger("ray_ep.serve")

OFF = frozenset({"/load_model", "/reset", "/v1/responses", "/v1/systemone", "/v1/audio/transcriptions"})
"""Paths of transformers' server that are not there."""


class _OneModel(ModelManager):
    """The model that ranks have; nothing is loaded here, nor unloaded."""

    def __init__(self, served: Served):
        super().__init__(device="cpu")
        self._served = served

    def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """What /v1/models lists."""
        return [{"id": self._served.name, "object": "model", "created": self._served.created, "owned_by": "ray_ep"}]


class _State(GenerationState):
    """Whether ranks answer, for /health."""

    def __init__(self, desk: Desk):
        super().__init__(continuous_batching=True)
        self._desk = desk

    def is_cb_alive(self) -> bool:
        """False: nothing is answered any more."""
        return not self._desk.engine.failed


Around = Callable[[], AbstractAsyncContextManager[None]]
"""What is done before the first request and after the last one."""


def build(served: Served, desk: Desk, keys: ApiKeys | None, most_bytes: int, around: Around | None = None) -> FastAPI:
    """The application.

    Args:
        keys: what opens it; None: it is open. most_bytes: of a request's body.
        around: entered when it starts, left when it ends.
    """
    manager, state = _OneModel(served), _State(desk)
    chat, completions = Chat(manager, state, served, desk), Completions(manager, state, served, desk)
    none: Any = None  # handlers of paths that are off
    app = build_server(manager, chat, completions, none, none, none, generation_state=state)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in OFF]
    app.title, app.version = "ray_ep", "1"
    _add_paths(app, desk)
    _add_errors(app)
    app.add_middleware(Guard, keys=keys, most_bytes=most_bytes)
    app.openapi = lambda: describe(app, served, desk.engine.limits, keys is not None)  # type: ignore[method-assign]
    if around is not None:
        app.router.lifespan_context = _entered(around)
    return app


def _entered(around: Around) -> Any:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with around():
            yield

    return lifespan


def _add_paths(app: FastAPI, desk: Desk) -> None:
    @app.get("/ready")
    def ready() -> Response:
        """200: requests are taken in; 503: not now."""
        if desk.open and not desk.engine.failed:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready", "reason": desk.engine.failed or "stopping"}, status_code=503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(desk.figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    """Every error as OpenAI's clients read it."""

    def answer(status: int, message: str, param: str = "", **headers: str) -> JSONResponse:
        return JSONResponse(error(status, printable(message), printable(param)), status_code=status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(_request: HttpRequest, e: Refused) -> Response:
        wait = {"Retry-After": str(e.retry_after_s)} if e.retry_after_s else {}
        return answer(e.status, str(e), e.param, **wait)

    @app.exception_handler(Unanswered)
    async def unanswered(_request: HttpRequest, e: Unanswered) -> Response:
        return answer(503, str(e))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: HttpRequest, e: RequestValidationError) -> Response:
        said = request.headers.get("content-type", "nothing")
        if "json" not in said:  # curl's -d alone says that it is a form
            return answer(400, f"the header Content-Type says {said}: expected application/json")
        return answer(400, f"the body is not a JSON object: {e.errors()[0]['msg']}")

    @app.exception_handler(HTTPException)
    async def other(_request: HttpRequest, e: HTTPException) -> Response:
        return answer(e.status_code, str(e.detail), **(e.headers or {}))

    @app.exception_handler(Exception)
    async def ours(_request: HttpRequest, e: Exception) -> Response:
        log.error("failed: %r", e)
        return answer(500, "an error of the server itself: its log tells more")
