"""POST /v1/completions: text or tokens in, text out; several prompts at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import Completion, CompletionChoice
from transformers.cli.serving.completion import CompletionHandler

from ray_ep.errors import brief
from ray_ep.serve.http.admission import Refused
from ray_ep.serve.http.bodies import CompletionBody, printable, read
from ray_ep.serve.http.desk import Desk, Piece, begun, whole
from ray_ep.serve.http.events import events, usage_of
from ray_ep.serve.http.probabilities import of_completion
from ray_ep.serve.http.served import Served, asked


class Completions(CompletionHandler):
    """Goes on from prompts.

    Args:
        manager, state: transformers' ModelManager and GenerationState, as their handlers take them.
    """

    def __init__(self, manager: Any, state: Any, served: Served, desk: Desk):
        super().__init__(manager, state)
        self._served, self._desk = served, desk

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        """An answer, or a stream of it; raises Refused, Unanswered."""
        completion = read(CompletionBody, body)
        self._served.check_name(completion.model)
        prompts = await asyncio.to_thread(self._prompts, completion)
        ask = asked(completion, self._served, self._desk.engine.limits, prompts, request_id)
        pieces = self._desk.answers(ask)
        if completion.stream:
            stream = self._chunks(await begun(pieces), completion, prompts, request_id)
            return StreamingResponse(events(stream), media_type="text/event-stream")
        found = await whole(pieces, len(ask.requests))
        choices = []
        for number, answer in enumerate(found):
            probabilities = [one for piece in answer for one in piece.logprobs]
            choices.append(
                CompletionChoice(
                    index=number,
                    text="".join(item for piece in answer for item in piece.items),
                    finish_reason=answer[-1].finish,
                    logprobs=of_completion(probabilities, self._served.tokenizer, 0),
                )
            )
        tokens = sum(piece.tokens for answer in found for piece in answer)
        told = self._told(request_id, choices, usage=usage_of(prompts, tokens))
        return JSONResponse(told.model_dump(exclude_none=True))

    def _prompts(self, completion: CompletionBody) -> list[list[int]]:
        """Tokens of each prompt; raises Refused."""
        given: list[Any] = [completion.prompt] if isinstance(completion.prompt, str) else list(completion.prompt)
        if isinstance(given[0], int):
            return [given]
        try:
            return [p if isinstance(p, list) else self._served.tokenizer(p)["input_ids"] for p in given]
        except Exception as e:  # half characters, above all
            raise Refused(f"prompt: the tokenizer does not take it: {printable(brief(e))}", "prompt") from None

    def _told(self, request_id: str, choices: list[Any], **more: Any) -> Completion:
        return Completion(
            id=request_id,
            created=int(time.time()),
            object="text_completion",
            model=self._served.name,
            choices=choices,
            **more,
        )

    async def _chunks(
        self, pieces: AsyncIterator[Piece], completion: CompletionBody, prompts: list[list[int]], request_id: str
    ) -> AsyncIterator[Completion]:
        tokens, said = 0, [0] * len(prompts) * (completion.n or 1)  # characters of each answer
        async with aclosing(pieces) as rest:  # type: ignore[type-var]
            async for piece in rest:
                tokens += piece.tokens
                text = "".join(piece.items)
                if not (text or piece.finish or piece.logprobs):
                    continue
                choice = CompletionChoice.model_construct(  # finish_reason is None until the end
                    index=piece.choice,
                    text=text,
                    finish_reason=piece.finish or None,
                    logprobs=of_completion(piece.logprobs, self._served.tokenizer, said[piece.choice]),
                )
                said[piece.choice] += len(text)
                yield self._told(request_id, []).model_copy(update={"choices": [choice]})
            if completion.usage_at_the_end:
                yield self._told(request_id, [], usage=usage_of(prompts, tokens))
