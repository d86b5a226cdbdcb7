"""Certificates of a control: read and tried before it listens, and what both ends make of them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from ray_ep.config.sections.observing import ControlConfig
from ray_ep.control.keys import private, stamp
from ray_ep.errors import BadInput, ConfigError


def server_credentials(cfg: ControlConfig, failed: Callable[[str], None]) -> grpc.ServerCredentials | None:
    """What a server shows and asks for, as the files have it when somebody connects; None: no TLS.

    Args:
        failed: is told why files that have changed cannot be used; what they had before is shown then.

    Raises:
        ConfigError: a file cannot be read, its key can be read by others, or the certificate does not match its key.
    """
    if not cfg.tls_cert:
        return None
    paths = [path for path in (cfg.tls_cert, cfg.tls_key, cfg.tls_client_ca) if path]
    seen = list(map(stamp, paths))

    def renewed() -> Any:
        now = list(map(stamp, paths))
        if now == seen:
            return None  # as before
        seen[:] = now
        try:
            return _shown(cfg)
        except ConfigError as e:
            failed(f"{e}; until that is mended, connections are made with the certificate of before")
            return None

    return grpc.dynamic_ssl_server_credentials(
        _shown(cfg), renewed, require_client_authentication=bool(cfg.tls_client_ca)
    )


def _shown(cfg: ControlConfig) -> Any:
    """Certificate, key and authorities. Raises ConfigError."""
    key, cert = pair(("control.tls_key", cfg.tls_key), ("control.tls_cert", cfg.tls_cert))
    authorities = _authorities(cfg.tls_client_ca, "control.tls_client_ca") if cfg.tls_client_ca else None
    return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)


def pair(key: tuple[str, str], cert: tuple[str, str]) -> tuple[bytes, bytes]:
    """A private key and its certificate, each from (what gave it, path). Raises ConfigError: they are no pair."""
    found = private(key[1], key[0]), _read(cert[1], cert[0])
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert[1], key[1], password=lambda: b"")
    except (ssl.SSLError, ValueError) as e:
        what = "does not match its key" if "MISMATCH" in str(e) else f"and its key are no pair that can be used ({e})"
        raise ConfigError(
            f"{cert[0]}={cert[1]!r} {what}: {key[0]}={key[1]!r}; expected PEM files of one pair"
        ) from None
    return found


def channel_credentials(ca: str, cert: str, key: str) -> grpc.ChannelCredentials:
    """What a client goes by; "" as of address.Target. Raises BadInput."""
    if bool(cert) != bool(key):
        raise BadInput("--cert and --key: give both, or none")
    try:
        roots = _authorities(ca, "--ca") if ca else None
        return grpc.ssl_channel_credentials(roots, *(pair(("--key", key), ("--cert", cert)) if key else ()))
    except ConfigError as e:
        raise BadInput(str(e)) from None


def _authorities(path: str, key: str) -> bytes:
    pem = _read(path, key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{key}={path!r}: expected PEM certificates there") from None
    return pem


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"{key}={path!r}: {e.strerror or e}") from None
