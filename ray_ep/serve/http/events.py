"""A stream as server-sent events, and the errors in it; what an error looks like to OpenAI's clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from openai.types.completion_usage import CompletionUsage
from transformers.cli.serving.utils import BaseHandler

from ray_ep.serve.http.desk import Unanswered

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


async def events(told: AsyncIterator[Any]) -> AsyncIterator[str]:
    """A stream's pieces as events, ended by [DONE]; an error on the way is the last one before it."""
    async with aclosing(told) as rest:  # type: ignore[type-var]
        try:
            async for chunk in rest:
                yield BaseHandler.chunk_to_sse(chunk)
        except Unanswered as e:
            yield BaseHandler.chunk_to_sse(json.dumps(error(503, str(e))))
        yield BaseHandler.chunk_to_sse("[DONE]")


def error(status: int, message: str, param: str = "") -> dict[str, Any]:
    """An error as OpenAI words it."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param or None, "code": None}}


def usage_of(prompts: Sequence[Sequence[int]], tokens: int) -> CompletionUsage:
    """How many tokens were read and generated."""
    read = sum(map(len, prompts))
    return CompletionUsage(prompt_tokens=read, completion_tokens=tokens, total_tokens=read + tokens)
