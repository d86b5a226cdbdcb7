"""`ray-ep serve`: what is checked before anything is started, ranks behind an HTTP server, and its end."""

from __future__ import annotations

import importlib.util
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_ep.config.schema import Config
from ray_ep.control.tls import pair
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import BadInput, ConfigError, RayEPError
from ray_ep.observe.phases import Phases
from ray_ep.serve.checked import Checked, check_checkpoint
from ray_ep.serve.engine import Engine, engine
from ray_ep.serve.http.admission import Places
from ray_ep.serve.http.desk import Desk
from ray_ep.serve.http.figures import Figures
from ray_ep.serve.http.keys import ApiKeys
from ray_ep.serve.http.served import Served
from ray_ep.serve.tokens import bytes_tokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

_EXTRA = ("fastapi", "uvicorn", "openai", "opentelemetry.exporter.prometheus")


@dataclass(frozen=True, slots=True)
class Front:
    """A server before it has ranks: all that could be refused was looked at."""

    checked: Checked
    served: Served
    desk: Desk
    keys: ApiKeys | None

    def opens(self, it: Engine) -> None:
        """Requests are taken in from now on, and `it` answers them."""
        places = self.desk.places
        figures = Figures(self.served.name, it.limits, it.status, lambda: (places.taken, places.most))
        self.desk.opens(it, figures)


def prepared(cfg: Config) -> Front:
    """The front of a server as the configuration says; starts nothing.

    Raises:
        BadInput: packages of the extra `serve` are missing, a key's file or a certificate is no such thing, or the
            checkpoint cannot be generated from.
    """
    missing = [name.split(".")[0] for name in _EXTRA if not _installed(name)]
    if missing:
        raise BadInput(f"ray-ep serve: {missing[0]} is not installed: pip install 'ray_ep[serve]'")
    if not cfg.model.path:
        raise ConfigError("model.path='': expected the directory of a transformers checkpoint to serve")
    keys = ApiKeys(cfg.serve.api_key_file) if cfg.serve.api_key_file else None
    if cfg.serve.tls_cert:
        pair(("serve.tls_key", cfg.serve.tls_key), ("serve.tls_cert", cfg.serve.tls_cert))
    checked = check_checkpoint(cfg)
    tokenizer = bytes_tokenizer() if checked.text.tokenizer is None else checked.text.tokenizer
    if not tokenizer.is_fast:
        raise BadInput(
            f"{cfg.model.path}: its tokenizer has no tokenizer.json: save it with transformers, as a fast one"
        )
    served = Served(
        name=cfg.serve.model_name or Path(cfg.model.path).name,
        tokenizer=tokenizer,
        config=checked.config,
        generation_config=_generation_config(cfg.model.path),
        eos=checked.eos,
        created=int(time.time()),
    )
    return Front(checked, served, Desk(Places(cfg.serve.answers, time.monotonic), tokenizer), keys)


def application(cfg: Config, front: Front, around: Any = None) -> FastAPI:
    """The ASGI application of a front; `around` as of `server.build`."""
    from ray_ep.serve.http.server import build

    return build(front.served, front.desk, front.keys, int(cfg.serve.body_mb * 2**20), around)


def serve(cfg: Config, tell: Callable[[str, Front], None]) -> str:
    """Serve until SIGINT or SIGTERM, then let answers under way end; blocks.

    Args:
        tell: told the base address (`http://HOST:PORT/v1`) once requests are taken in.

    Returns:
        The signal's name.

    Raises:
        BadInput: nothing was started. RayEPError: ranks failed.
    """
    with Interrupt().caught() as interrupt, Phases() as phase:
        phase("reading the checkpoint's configuration")
        front = prepared(cfg)
        with (
            _listening(cfg.serve.host, cfg.serve.port) as at,
            engine(cfg, front.checked, front.desk.deliver, interrupt, phase) as it,
        ):
            front.opens(it)
            interrupt.hold()
            tell(_address(cfg, at), front)
            _run(cfg, application(cfg, front), at, front.desk)
            if it.failed:
                raise RayEPError(f"nothing is answered any more: {it.failed}")
    return interrupt.asked


def _run(cfg: Config, app: FastAPI, at: socket.socket, desk: Desk) -> None:
    """Answer until a signal comes or ranks fail."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            desk.open = False
            super().handle_exit(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            return bool(desk.engine.failed) or await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(cfg.serve.grace_s),
        ssl_certfile=cfg.serve.tls_cert or None,
        ssl_keyfile=cfg.serve.tls_key or None,
    )
    Server(config).run(sockets=[at])


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything is started; raises BadInput."""
    what = f"serve.host={host!r}, serve.port={port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        at = socket.socket(family, kind)
        try:
            at.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            at.bind(address)
            at.listen(1)  # else another one could be bound here, too
        except OSError:
            at.close()
            raise
    except OSError as e:
        free = ": give another port, or 0 for a free one" if port else ""
        raise BadInput(f"{what}: cannot listen there: {e.strerror or e}{free}") from None
    return at


def _address(cfg: Config, at: socket.socket) -> str:
    host = f"[{cfg.serve.host}]" if ":" in cfg.serve.host else cfg.serve.host
    return f"{'https' if cfg.serve.tls_cert else 'http'}://{host}:{at.getsockname()[1]}/v1"


def _generation_config(path: str) -> Any:
    """What the checkpoint says of sampling; None: nothing."""
    from transformers import GenerationConfig

    if not (Path(path) / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as e:  # whatever a file may hold
        raise BadInput(f"{path}/generation_config.json: not what transformers writes: {e}") from None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
