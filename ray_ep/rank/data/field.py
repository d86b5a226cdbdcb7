"""What is taken out of a row of a table: its text, or its conversation. A document is bytes in any case.

Names the row in what it refuses. Knows nothing of files, formats or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray_ep.config.schema import DataConfig
from ray_ep.errors import DataError
from ray_ep.rank.data.decode import text_of_bytes


@dataclass(frozen=True, slots=True)
class Field:
    """The field or column that holds the documents: text.

    Args:
        name: of the field. key: of the configuration that names it.
    """

    name: str
    key: str = "data.text_field"

    text = True
    """Whether the field holds text, and nothing else."""

    def __str__(self) -> str:
        return f"{self.key}={self.name!r}"

    def columns(self, there: Iterable[str]) -> list[str]:
        """Those of a table's columns that a document is made of."""
        return [name for name in there if name == self.name]

    def document(self, row: Any, where: str, encoding: str = "utf-8") -> bytes:
        """The text of one row in UTF-8; null is an empty document. Raises DataError: no such field, no text."""
        text = self.value(row, where)
        if isinstance(text, bytes):
            text = text_of_bytes(text, encoding, where)
        if not isinstance(text, str | None):
            raise DataError(f"{where}: {self} holds a {type(text).__name__}, not text")
        try:
            return (text or "").removeprefix("\ufeff").encode()
        except UnicodeEncodeError as e:
            code = f"\\u{ord(e.object[e.start]):04x}"
            raise DataError(f"{where}: {self} holds {code} alone, half of a character, at position {e.start}") from None

    def value(self, row: Any, where: str) -> Any:
        """What a row has there. Raises DataError: no such field."""
        if not isinstance(row, dict):
            raise DataError(f"{where}: is a {type(row).__name__}, not an object with {self}")
        if self.name in row:
            return row[self.name]
        has = f"it has {some(row)}"
        if lists := [name for name, value in row.items() if isinstance(value, list)]:
            has += (
                f" (rows are the file's outermost array, or stand one after the other: {lists[0]!r} is not looked into)"
            )
        raise DataError(f"{where}: no field {self}; {has}")


class Messages(Field):
    """The field that holds conversations: a list of messages, each with a role; a document is it as JSON.

    Beside it, `tools` is what the chat template is given as such.
    """

    text = False

    def columns(self, there: Iterable[str]) -> list[str]:
        """See `Field.columns`."""
        return [name for name in there if name in (self.name, "tools")]

    def document(self, row: Any, where: str, encoding: str = "utf-8") -> bytes:
        """The conversation of one row; null or an empty list is an empty document. Raises DataError: it is none."""
        messages = _parsed(self.value(row, where))
        if not messages and (messages is None or isinstance(messages, list | str)):
            return b""
        if not isinstance(messages, list):
            raise DataError(f"{where}: {self} holds a {type(messages).__name__}, not a list of messages")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                has = some(message) if isinstance(message, dict) else f"a {type(message).__name__}"
                raise DataError(
                    f"{where}: message {number} of {self} has no role: a message has role (system, user, assistant, "
                    f"tool) and content; it has {has}"
                )
        if not any(m["role"] == "assistant" for m in messages):
            raise DataError(f"{where}: {self} has no message of role assistant: there is nothing to learn from it")
        kept = [{k: v for k, v in m.items() if v is not None} for m in messages]  # columns that other rows have
        tools = _parsed(row.get("tools")) or None
        return json.dumps({"messages": kept, "tools": tools}).encode()


def field_of(cfg: DataConfig) -> Field:
    """What data.format asks for."""
    if cfg.format == "chat":
        return Messages(cfg.messages_field, "data.messages_field")
    return Field(cfg.text_field)


def some(names: Iterable[str]) -> str:
    """The first of them, for a message."""
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _parsed(value: Any) -> Any:
    """Lists that a table holds as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value
