"""Kinds of GPUs for simulated clusters: how fast, how well joined, how much memory, at what price. Pure.

The figures are the makers' data sheets': dense bf16 peak relative to an H800's (989 TFLOP/s, to which `StepCosts`'
defaults belong), bytes/s from one GPU to another of its node one way (NVLink; PCIe 4.0 x16 for L40S and L4), memory.
A layer reaches a share of the peak that differs from kind to kind: what was measured is better, and can be given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ray_ep.errors import PlacementError
from ray_ep.placement.whatif.description import bytes_per_second

_H800 = 989.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind.

    Args:
        speed: relative compute speed; 1 is what the costs' expert_seconds were measured on.
        inside: bytes/s between two of a node; None: as the cluster says.
        memory_gb: 10^9 bytes; None: not known, everything fits.
        price: of one for an hour, in any currency; None: not known.
    """

    name: str
    speed: float = 1.0
    inside: float | None = None
    memory_gb: float | None = None
    price: float | None = None


GPUS = {
    g.name: g
    for g in (
        Gpu("b200", 2250 / _H800, 900e9, 180),
        Gpu("h200", 1.0, 450e9, 141),
        Gpu("h100", 1.0, 450e9, 80),
        Gpu("h800", 1.0, 200e9, 80),
        Gpu("h20", 148 / _H800, 450e9, 96),
        Gpu("a100", 312 / _H800, 300e9, 80),
        Gpu("l40s", 362 / _H800, 32e9, 48),
        Gpu("l4", 121 / _H800, 32e9, 24),
    )
}
"""Kinds that are known by name."""
_KEYS = tuple(f.name for f in fields(Gpu))[1:]


def gpu(text: str) -> Gpu:
    """A kind as a user names it: "h100", "h100:price=3.5", or one's own: "mine:speed=0.4,inside=64 GB/s,memory_gb=24".

    Raises:
        PlacementError: a name that is not known and has no figures, a figure that is not what it should be.
    """
    name, colon, rest = text.partition(":")
    name = name.strip().lower()
    if not name or (name not in GPUS and not colon):
        raise PlacementError(
            f"gpu {text!r}: known are {', '.join(GPUS)}; others as NAME:speed=0.4,inside=64 GB/s,memory_gb=24,price=2"
        )
    found: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, sep, value = (x.strip() for x in item.partition("="))
        if not sep or key not in _KEYS:
            raise PlacementError(f"gpu {name}: {item!r}: expected KEY=VALUE, KEY {', '.join(_KEYS)}")
        where = f"gpu {name}: {key}"
        found[key] = bytes_per_second(value, where) if key == "inside" else _positive(value, where)
    return replace(GPUS.get(name, Gpu(name)), **found)


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise PlacementError(f"{where}={text}: expected a positive number")
    return value
