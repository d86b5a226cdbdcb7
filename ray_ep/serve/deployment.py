"""The same server as an application of Ray Serve: one ordinary replica, which owns the ranks.

A dead rank fails its replica, which Ray Serve then starts anew, with ranks of its own; there is no gang of replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from omegaconf import OmegaConf

from ray_ep.config import from_dict
from ray_ep.config.schema import Config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import BadInput, RayEPError
from ray_ep.serve.engine import engine
from ray_ep.serve.running import application, prepared


class Replica:
    """What Ray Serve runs: the ASGI application; ranks start before its first request and go after its last one."""

    def __init__(self, tree: dict[str, Any]):
        self._cfg = from_dict(tree)
        self._front = prepared(self._cfg)

    def __serve_build_asgi_app__(self) -> Any:
        return application(self._cfg, self._front, self._with_ranks)

    @asynccontextmanager
    async def _with_ranks(self) -> AsyncIterator[None]:
        with ExitStack() as stack:
            front = self._front
            ranks = engine(self._cfg, front.checked, front.desk.deliver, Interrupt())
            front.opens(await asyncio.to_thread(stack.enter_context, ranks))
            try:
                yield
            finally:
                front.desk.open = False

    def check_health(self) -> None:
        """Raise once ranks answer no more: Ray Serve starts another replica then."""
        if self._front.desk.open and self._front.desk.engine.failed:
            raise RayEPError(self._front.desk.engine.failed)


def app(cfg: Config) -> Any:
    """An application for `ray.serve.run`.

    Address, port and TLS are those of Ray Serve's own proxy (`serve.start(http_options=...)`).

    Raises:
        BadInput: as of `ray-ep serve`; or Ray Serve is missing.
    """
    try:
        from ray import serve
    except ImportError:
        raise BadInput("ray_ep.serve.app: Ray Serve is not installed: pip install 'ray_ep[serve]'") from None
    if cfg.serve.tls_cert:
        raise BadInput(f"serve.tls_cert={cfg.serve.tls_cert!r}: with Ray Serve its own proxy has the certificate")
    prepared(cfg)
    replica = serve.deployment(
        name="ray_ep",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},  # its ranks have the CPUs
        max_ongoing_requests=cfg.serve.answers + 32,  # the last ones are told that there are too many
        graceful_shutdown_timeout_s=cfg.serve.grace_s,
    )
    return replica(serve.ingress()(Replica)).bind(OmegaConf.to_container(cfg))
