"""Serving: an OpenAI-compatible front over ranks that generate.

HTTP, streaming and health are transformers' own server's (`transformers.cli.serving.build_server`); here lie the
requests that it takes, what is refused, and the ways to ranks and back. Imports control and the layers below it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from ray_ep.serve.deployment import app

        return app
    raise AttributeError(f"module 'ray_ep.serve' has no attribute {name!r}")
