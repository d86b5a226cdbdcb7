"""Times and sizes for people. Imports nothing."""

from __future__ import annotations


def in_seconds(value: float) -> str:
    """A time: "3.1 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{1e6 * value:.2g} us"


def in_bytes(value: float) -> str:
    """A size: "3.1 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
