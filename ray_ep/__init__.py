"""ray_ep: Mixture-of-Experts models with expert parallelism on a Ray cluster.

Public names load on first use, so importing this package reads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = ("collective", "config", "moe", "placement")
_NAMES = {
    "load_config": "ray_ep.config",
    "train": "ray_ep.api",
    "Run": "ray_ep.api",
    "open_run": "ray_ep.api",
    "export": "ray_ep.api",
    "probe": "ray_ep.api",
    "RayEPError": "ray_ep.errors",
    "BadInput": "ray_ep.errors",
}
__all__ = [*_SUBPACKAGES, *_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ray_ep.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'ray_ep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
