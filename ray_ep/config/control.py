"""What of a configuration must fit together for a run to be steered from outside; pure. Imports errors."""

from __future__ import annotations

import ipaddress
from typing import Any

from ray_ep.errors import ConfigError


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address: localhost, 127.0.0.0/8, ::1."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def check_control(cfg: Any) -> None:
    """Raise ConfigError for keys (of the whole `Config`) that do not go together."""
    control = cfg.control
    if control.port > 65535:
        raise ConfigError(f"control.port={control.port}: allowed are 0 (a free one) to 65535")
    if not control.address:
        raise ConfigError("control.address='': expected an address of this machine, such as 127.0.0.1 or 0.0.0.0")
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
        if control[one] and not control[other]:
            raise ConfigError(f"control.{one}={control[one]!r} needs control.{other}, too")
    if control.enabled and not control.tls_cert and not is_loopback(control.address):
        raise ConfigError(
            f"control.address={control.address!r} is reached from other machines, to which tokens would travel in the "
            "open: give control.tls_cert and control.tls_key, or a loopback address such as 127.0.0.1"
        )
