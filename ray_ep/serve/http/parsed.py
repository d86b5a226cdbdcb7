"""What of an answer's text is reasoning, and what a call of a tool: by transformers' own templates of answers."""

from __future__ import annotations

from typing import Any


class Parsed:
    """Text in pieces -> text, `ReasoningText` and `ToolCall`.

    Args:
        parser: transformers' `ResponseParser`; None: all is text. What it cannot read is text, too.
    """

    def __init__(self, parser: Any):
        self._parser = parser
        self.parses, self.called = parser is not None, False
        self._first = list(parser.initial_events) if parser else []

    def feed(self, text: str) -> list[Any]:
        """What a piece of text brings."""
        if self._parser is None:
            return [text] if text else []
        events, self._first = self._first, []
        try:
            return self._items(events + (self._parser.feed(text) if text else []))
        except Exception:  # no JSON where some should be, and whatever else a model may write
            self._parser = None
            return [text] if text else []

    def rest(self) -> list[Any]:
        """What the end brings; half a call of a tool is dropped."""
        if self._parser is None:
            return []
        try:
            return self._items(self._parser.finalize()[1])
        except Exception:
            return []

    def _items(self, events: list[dict[str, Any]]) -> list[Any]:
        from transformers.cli.serving.utils import ToolCall, response_events_to_chunks

        items = response_events_to_chunks(events)
        self.called |= any(isinstance(item, ToolCall) for item in items)
        return items
