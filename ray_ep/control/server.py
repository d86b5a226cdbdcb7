"""The control of one run: a gRPC server in a thread of the driver's process, from the run's start to its end.

A listener of the run (driver.publisher): it begins to listen when the ranks are ready. If it cannot, that is an event,
and the run goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from ray_ep.config.control import is_loopback
from ray_ep.config.sections.observing import ControlConfig
from ray_ep.control import address
from ray_ep.control.address import Target
from ray_ep.control.audit import Audit
from ray_ep.control.board import Board
from ray_ep.control.door import Door, at_a_loss
from ray_ep.control.keys import Keys, cluster_token, new_token
from ray_ep.control.pressed import Buttons
from ray_ep.control.service import SERVICE, Service
from ray_ep.control.tls import server_credentials
from ray_ep.control.trace import trace
from ray_ep.driver.records import Event, StepRecord
from ray_ep.driver.requests import Requests
from ray_ep.driver.run.rundir import RunDir
from ray_ep.errors import ConfigError, PlacementError
from ray_ep.observe.state import RunState
from ray_ep.placement import Placement

CONNECTIONS = 400
"""At once; more are closed: the driver's other files need their share of 1,024, which is what many systems allow."""
GREETING_S = 10.0
"""Seconds within which who connects must have spoken TLS and HTTP/2, and answers whether it is still there."""
CALLS = 1024
"""Calls at once, watchers included; more are refused (RESOURCE_EXHAUSTED)."""
MESSAGE_BYTES = 4 << 20
"""Of a message that is taken: a placement of 61 layers x 320 ranks x 8 slots is a tenth of it."""
START_S = 30.0
"""Seconds that the server may take to listen; it takes 0.1."""
GRACE_S = 2.0
"""Seconds that calls under way are given at the run's end."""

log = logging.getLogger("ray_ep.control")


class Control:
    """Listens for one run; a context manager, at whose end nobody is served any more.

    Args:
        requests: the driver's queue. tell: an operator, by an event. ray_token: of the Ray cluster, once it is joined;
            "": it has none.

    Attributes:
        buttons: for the run's page.
    """

    def __init__(
        self,
        cfg: ControlConfig,
        run: RunDir,
        requests: Requests,
        tell: Callable[[Event], None],
        ray_token: Callable[[], str] = cluster_token,
    ):
        self.cfg, self.run, self.requests, self._tell, self._ray_token = cfg, run, requests, tell, ray_token
        self.buttons = Buttons(cfg)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._board: Board | None = None
        self._end: asyncio.Event | None = None

    def __enter__(self) -> Control:
        """Nobody is served before `start`; what a driver left that was killed leads nowhere."""
        address.remove(self.run.path)
        return self

    def __exit__(self, *error: object) -> None:
        """Callers have had their answers, or GRACE_S for them; the thread has ended."""
        self.buttons.close()
        if self._thread is None:
            return
        self.requests.close("the run has ended")
        address.remove(self.run.path)
        if self._loop is not None and self._end is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(3 * GRACE_S)

    def start(self, event: Event) -> None:
        """The ranks are ready: listen."""
        if not self.cfg.enabled:
            return
        up: Future[Target] = Future()
        self._thread = threading.Thread(target=self._serve, args=(up,), name="ray_ep-control", daemon=True)
        self._thread.start()
        try:
            target = up.result(START_S)
            address.write(self.run.path, target)
        except Exception as e:  # of any kind: it is no reason to end a run
            why = str(e) if isinstance(e, ConfigError) else f"{type(e).__name__}: {e}"
            self._tell(Event("control", f"nobody can see or steer this run from outside: {why}"))
            return
        secured = " with TLS" if target.tls else ""
        command = shlex.join(["ray-ep", "status", str(self.run.path)])
        words = f"listens on {target.address}{secured}; see and steer it with: {command}"
        self._tell(Event("control", words, {"address": target.address, "tls": target.tls}))

    def step(self, record: StepRecord) -> None:
        """One step is done: watchers are shown it."""
        if self._board is not None:
            self._board.tell()

    def event(self, event: Event) -> None:
        """Something happened: watchers are shown it."""
        if self._board is not None:
            self._board.tell()

    def _serve(self, up: Future[Target]) -> None:
        try:
            asyncio.run(self._main(up))
        except Exception as e:
            log.exception("control has ended")
            if not up.done():
                up.set_exception(e)

    async def _main(self, up: Future[Target]) -> None:
        token, ray = new_token(), self._ray_token()
        try:
            keys, credentials = Keys(self.cfg, token, ray, self._failed), server_credentials(self.cfg, self._failed)
        except ConfigError as e:
            up.set_exception(e)
            return
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(at_a_loss)
        board = Board(RunState(self.run.path), self.requests.where)
        audit = Audit(self.run.path, lambda words: self._tell(Event("not-written", words)))
        traces = partial(trace, self.run.path)
        service = Service(keys, self.requests, board, self._placement, traces, audit)
        server, healthy = await _server(service)
        at = self.cfg.address
        where = f"[{at}]:{self.cfg.port}" if ":" in at else f"{at}:{self.cfg.port}"
        try:
            port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        except RuntimeError:
            up.set_exception(ConfigError(cannot_listen(self.cfg)))
            return
        await server.start()
        self._board = board
        self.buttons.open(service, token)
        up.set_result(self._target(port, token))
        keeping = asyncio.create_task(board.keep())
        await self._end.wait()
        await healthy.enter_graceful_shutdown()
        await board.end()
        await server.stop(GRACE_S)
        await keeping

    def _failed(self, words: str) -> None:
        """Tell an operator what cannot be used any more."""
        self._tell(Event("control", words))

    def _target(self, port: int, token: str) -> Target:
        """How to reach it, for the run's directory."""
        at, host = self.cfg.address, socket.gethostname()
        name = at if is_loopback(at) or at not in ("0.0.0.0", "::", "[::]") else host
        shown = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        return Target(shown, token, host, os.getpid(), bool(self.cfg.tls_cert), self.cfg.tls_cert)

    def _placement(self, version: int) -> Placement | None:
        """The placement of this version, as the run's directory keeps it."""
        with suppress(PlacementError):
            return Placement.load(self.run.path / "placements" / f"{version:04d}.json")
        return None


async def _server(service: Service) -> tuple[Any, Any]:
    """A server with the service, its health and its description, and the health to be told."""
    options = [
        ("grpc.so_reuseport", 0),  # else a second run would share the port
        ("grpc.max_allowed_incoming_connections", CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", int(1000 * GREETING_S)),
        ("grpc.http2.settings_timeout", int(1000 * GREETING_S)),
        ("grpc.keepalive_time_ms", 60_000),  # of whose machine is gone nothing else is heard
        ("grpc.keepalive_timeout_ms", int(1000 * GREETING_S)),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    server = grpc.aio.server(interceptors=[Door(service)], options=options, maximum_concurrent_rpcs=CALLS)
    server.add_generic_rpc_handlers((service.handler(),))
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for name in ("", SERVICE.full_name):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE.full_name, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server, healthy


def cannot_listen(cfg: ControlConfig) -> str:
    """Why an address cannot be listened on."""
    what = f"control.address={cfg.address!r}, control.port={cfg.port}"
    try:
        found = socket.getaddrinfo(cfg.address, cfg.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0]) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            it.bind(found[4])
    except OSError as e:
        free = ": give another port, or 0 for a free one" if cfg.port else ""
        return f"{what}: cannot listen there: {e.strerror or e}{free}"
    return f"{what}: cannot listen there"
