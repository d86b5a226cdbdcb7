"""Who is at the other end of a connection from this machine, as Linux knows it. The standard library alone."""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"

Address = tuple[Any, ...]
"""Of a socket: host, port, and what else its family has."""


def on_loopback(peer: Address, here: Address) -> bool:
    """Whether both ends are on this machine's loopback: nobody between them reads along."""
    try:
        return all(_plain(end[0]).is_loopback for end in (peer, here))
    except (ValueError, IndexError):
        return False


def user_of(peer: Address, here: Address) -> int | None:
    """The user whose process holds the other end of a connection on loopback; None: not known.

    Args:
        peer: address of that end. here: of ours.
    """
    wanted = [(_packed(peer, mapped), _packed(here, mapped)) for mapped in (False, True)]
    for table in _TABLES:
        try:
            rows = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # no Linux
            continue
        for row in rows:
            _, local, remote, state, _, _, _, user, *_ = row.split()
            if state == _ESTABLISHED and (local, remote) in wanted:
                return int(user)
    return None


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address; an IPv4 one that came in IPv6's clothes as IPv4."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _packed(address: Address, mapped: bool) -> str:
    """As the tables have it: words of four bytes in the machine's order, and the port.

    Args:
        mapped: an IPv4 address as a socket of IPv6 has it.
    """
    plain = _plain(address[0])
    raw = plain.packed
    if mapped and plain.version == 4:
        raw = socket.inet_pton(socket.AF_INET6, f"::ffff:{plain}")
    words = [raw[i : i + 4] for i in range(0, len(raw), 4)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return f"{b''.join(words).hex().upper()}:{int(address[1]):04X}"
