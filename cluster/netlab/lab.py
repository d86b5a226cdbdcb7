"""What a LAB.yaml says: hosts, and the bandwidth of each ordered pair of them. Pure; imports PyYAML."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PREFIX = "netlab"
SWITCH = "switch"
FAILED, BAD_INPUT = 1, 2
UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


class LabError(Exception):
    """What was wrong, where, what is allowed; `status` is the exit status."""

    def __init__(self, message: str, status: int = FAILED):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Host:
    """A host: how many ranks it is meant for, and the CPUs that Ray is told it has."""

    name: str
    ranks: int
    cpus: int


@dataclass(frozen=True)
class Lab:
    """A lab as described: hosts in order (the first is Ray's head) and the rate in bit/s of each ordered pair."""

    name: str
    hosts: tuple[Host, ...]
    rates: dict[tuple[str, str], int]
    object_store_mb: int = 200

    @property
    def head(self) -> Host:
        """The host of Ray's head and of the commands."""
        return self.hosts[0]

    @property
    def folder(self) -> Path:
        """Temporary files, Ray's logs among them: short, since Ray puts sockets there (107 characters at most)."""
        return Path("/tmp") / f"{PREFIX}-{self.name}"

    def namespace(self, host: str) -> str:
        """The network namespace of a host, or of the switch."""
        return f"{PREFIX}.{self.name}.{host}"

    def address(self, host: str) -> str:
        """IPv4 address of a host; labs differ in it only so that logs can be told apart.

        Raises:
            LabError: the lab has no such host.
        """
        code = zlib.crc32(self.name.encode())
        return f"10.{64 + code % 128}.{code // 128 % 256}.{self._index(host) + 1}"

    def class_id(self, host: str) -> str:
        """The htb class of what is sent to this host (tc reads it as hexadecimal)."""
        return f"1:{self._index(host) + 16:x}"

    def pairs(self) -> list[tuple[str, str]]:
        """Ordered pairs of different hosts."""
        names = [h.name for h in self.hosts]
        return [(a, b) for a in names for b in names if a != b]

    def _index(self, host: str) -> int:
        names = [h.name for h in self.hosts]
        if host not in names:
            raise LabError(f"lab {self.name} has no host {host!r}; allowed: {', '.join(names)}", BAD_INPUT)
        return names.index(host)


def bandwidth(text: Any, where: str) -> int:
    """'50mbit' -> 50_000_000 bit/s.

    Raises:
        LabError: not a number above 0 with a unit of tc's.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k?bit|mbit|gbit)", str(text).lower())
    bits = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if not 8_000 <= bits <= 100 * 10**9:
        raise LabError(f"{where}: bandwidth {text!r}; allowed: 8kbit to 100gbit, such as 50mbit or 1.5gbit", BAD_INPUT)
    return bits


def spell(bits: float) -> str:
    """50_000_000 bit/s -> '50mbit'."""
    unit = next((u for u in ("gbit", "mbit") if bits >= UNITS[u]), "kbit")
    return f"{bits / UNITS[unit]:.3g}{unit}"


def read_lab(path: Path) -> Lab:
    """Read a LAB.yaml.

    Raises:
        LabError: no such file, no YAML, or something in it is not what it should be.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise LabError(f"{path}: cannot be read: {e}", BAD_INPUT) from None
    data = _mapping(data, str(path), {"name", "hosts", "links", "object_store_mb"})
    name = data.get("name", path.stem)
    _check(isinstance(name, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,19}", name), f"{path}: name", name, "a-z 0-9 -")
    hosts = _hosts(data.get("hosts"), str(path))
    store = _number(data.get("object_store_mb", 200), f"{path}: object_store_mb", 80)
    rates = _rates(data.get("links", {}), hosts, f"{path}: links")
    return Lab(name, hosts, rates, int(store))


def _hosts(items: Any, path: str) -> tuple[Host, ...]:
    _check(isinstance(items, list) and 1 <= len(items) <= 250, f"{path}: hosts", items, "a list of 1 to 250 hosts")
    hosts: list[Host] = []
    for i, item in enumerate(items):
        where = f"{path}: hosts[{i}]"
        item = _mapping(item, where, {"name", "ranks", "cpus"})
        name, ranks = item.get("name"), _number(item.get("ranks", 1), f"{where}.ranks", 0)
        named = isinstance(name, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,10}", name)
        _check(named and name != SWITCH, f"{where}.name", name, "up to 11 of a-z 0-9 -, and not 'switch'")
        _check(name not in [h.name for h in hosts], f"{where}.name", name, "each name once")
        cpus = _number(item.get("cpus", ranks), f"{where}.cpus", 0)
        for key, value in (("ranks", ranks), ("cpus", cpus)):
            _check(value == int(value), f"{where}.{key}", value, "a whole number")
        hosts.append(Host(name, int(ranks), int(cpus)))
    return tuple(hosts)


def _rates(links: Any, hosts: tuple[Host, ...], where: str) -> dict[tuple[str, str], int]:
    links = _mapping(links, where, {"default", "pairs"})
    default = bandwidth(links.get("default", "10gbit"), f"{where}.default")
    names = [h.name for h in hosts]
    rates = {(a, b): default for a in names for b in names if a != b}
    items, given = links.get("pairs", []), set()
    _check(isinstance(items, list), f"{where}.pairs", items, "a list")
    for i, item in enumerate(items):
        at = f"{where}.pairs[{i}]"
        item = _mapping(item, at, {"from", "to", "between", "bandwidth"})
        both = "between" in item
        ends = item["between"] if both else [item.get("from"), item.get("to")]
        whole = set(item) == ({"between", "bandwidth"} if both else {"from", "to", "bandwidth"})
        known = isinstance(ends, list) and len(ends) == 2 and all(e in names for e in ends) and ends[0] != ends[1]
        _check(whole and known, at, item, f"bandwidth with from and to, or between: [A, B], two of {', '.join(names)}")
        for pair in [tuple(ends), tuple(ends[::-1])][: 1 + both]:
            _check(pair not in given, at, item, "each direction of a pair once")
            given.add(pair)
            rates[pair] = bandwidth(item.get("bandwidth"), f"{at}.bandwidth")
    return rates


def _mapping(value: Any, where: str, keys: set[str]) -> dict[str, Any]:
    _check(isinstance(value, dict) and set(value) <= keys, where, value, f"a mapping of {', '.join(sorted(keys))}")
    return value


def _number(value: Any, where: str, least: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 10**6
    _check(good, where, value, f"a number of at least {least:g}")
    return value


def _check(good: Any, where: str, value: Any, allowed: str) -> None:
    if not good:
        raise LabError(f"{where}: {value!r}; allowed: {allowed}", BAD_INPUT)
