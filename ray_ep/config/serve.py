"""What of a configuration must fit together for a model to be served over HTTP; pure. Imports errors."""

from __future__ import annotations

from typing import Any

from ray_ep.config.control import is_loopback
from ray_ep.errors import ConfigError


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
