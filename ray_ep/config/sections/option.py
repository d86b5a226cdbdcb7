"""How a field of the schema is written down. Imports nothing of the package."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def opt(default: Any, text: str, allowed: tuple[Any, ...] = ()) -> Any:
    """A field with its help text and, where the choice is closed, the allowed values."""
    meta = {"help": text, "allowed": allowed}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)
