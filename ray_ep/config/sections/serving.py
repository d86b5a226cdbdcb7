"""The section of the schema about serving over HTTP, and what of a configuration must fit together for it; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_ep.config.control import is_loopback
from ray_ep.config.sections.option import opt
from ray_ep.errors import ConfigError


@dataclass
class ServeConfig:
    """Serving over HTTP, as OpenAI's API has it: `ray-ep serve` and `ray_ep.serve.app` (docs/serve.md)."""

    host: str = opt("127.0.0.1", "address to listen on; beyond this machine's loopback only with keys and TLS")
    port: int = opt(8000, "port to listen on; 0: a free one, which is told")
    model_name: str = opt("", "what requests call the model; empty: the name of its directory")
    api_key_file: str = opt(
        "", "file with the keys that open the server, one a line, of mode 0600; read again when it changes; empty: none"
    )
    tls_cert: str = opt("", "PEM file with the server's certificate and its chain; empty: no TLS")
    tls_key: str = opt("", "PEM file with the private key of tls_cert, of mode 0600")
    answers: int = opt(256, "answers under way at once, computed or waiting; who asks for more is told when to return")
    body_mb: float = opt(4.0, "most MiB of a request's body")
    grace_s: float = opt(30.0, "how long answers under way may go on once a stop was asked for")


def check_serve(cfg: Any) -> None:
    """Raise ConfigError for keys (of the whole `Config`) that do not go together."""
    serve = cfg.serve
    if serve.port > 65535:
        raise ConfigError(f"serve.port={serve.port}: allowed are 0 (a free one) to 65535")
    if not serve.host:
        raise ConfigError("serve.host='': expected an address of this machine, such as 127.0.0.1 or 0.0.0.0")
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if serve[one] and not serve[other]:
            raise ConfigError(f"serve.{one}={serve[one]!r} needs serve.{other}, too")
    if is_loopback(serve.host):
        return
    missing = [f"serve.{key}" for key in ("api_key_file", "tls_cert", "tls_key") if not serve[key]]
    if missing:
        raise ConfigError(
            f"serve.host={serve.host!r} is reached from other machines: give {', '.join(missing)}, too, or a loopback "
            "address such as 127.0.0.1"
        )
