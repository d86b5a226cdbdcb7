"""From a request that was admitted to the pieces of its answers: submits, sorts what comes back, cancels what is left.

All of it runs in the event loop but `Desk.deliver`, which the engine's thread calls. No HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from ray_ep.errors import RequestError
from ray_ep.rank.generate.requests import CANCELLED, ERROR, LENGTH, STOP, Delta, Request, TokenLogprob
from ray_ep.serve.answering import Answering
from ray_ep.serve.http.admission import Places, Refused
from ray_ep.serve.http.figures import Figures
from ray_ep.serve.http.parsed import Parsed
from ray_ep.serve.http.words import Spelled, UpToStop


class Unanswered(Exception):
    """Ranks did not answer: why, in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request over HTTP, admitted.

    Attributes:
        requests: one for each answer. stop: strings that end one.
        parser: makes what tells reasoning and calls of tools from text; None: all is text.
    """

    operation: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...] = ()
    parser: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new of one answer.

    Attributes:
        choice: which answer. items: text, `ReasoningText` or `ToolCall`, as transformers' server has them.
        tokens: how many are new. finish: why it ends here, as OpenAI says it; "": it goes on.
    """

    choice: int
    items: tuple[Any, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Any = ""  # OpenAI's types name a few words


class _Answer:
    """One answer while it comes."""

    def __init__(self, number: int, asked: Asked, tokenizer: Any):
        self._number, self._request = number, asked.requests[number]
        self._parsed = Parsed(asked.parser() if asked.parser else None)
        self._spelled, self._cut = Spelled(tokenizer, special=asked.parser is not None), UpToStop(asked.stop)
        self.first = self.last = 0.0  # when tokens came, seconds of the clock
        self.tokens = 0

    def take(self, delta: Delta, now: float) -> Piece:
        """The piece that a delta makes; raises Unanswered."""
        if delta.done in (ERROR, CANCELLED):
            raise Unanswered(delta.error or "the server is stopping")
        if delta.tokens:
            self.first, self.last = self.first or now, now
            self.tokens += len(delta.tokens)
        ended = delta.done == STOP and delta.tokens and delta.tokens[-1] in self._request.eos
        shown = delta.tokens[:-1] if ended and not self._parsed.parses else delta.tokens
        text = self._cut.feed(self._spelled.feed(shown))
        if delta.done and not self._cut.stopped:
            text += self._cut.feed(self._spelled.rest()) + self._cut.rest()
        over = bool(delta.done) or self._cut.stopped
        items = self._parsed.feed(text) + (self._parsed.rest() if over else [])
        return Piece(
            choice=self._number,
            items=tuple(items),
            tokens=len(delta.tokens),
            logprobs=delta.logprobs,
            finish=self._finish(delta.done) if over else "",
        )

    def _finish(self, done: str) -> str:
        if done == LENGTH and not self._cut.stopped:
            return "length"
        return "tool_calls" if self._parsed.called else "stop"


class Desk:
    """Where requests wait for what ranks answer.

    Args:
        places: how many may be under way. clock: seconds, for figures.
    """

    def __init__(self, places: Places, tokenizer: Any, clock: Callable[[], float] = time.monotonic):
        self.places, self.tokenizer, self._clock = places, tokenizer, clock
        self.open = False  # whether requests are taken in
        self._engine: Answering | None = None
        self._figures: Figures | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, asyncio.Queue[Delta]] = {}

    def opens(self, engine: Answering, figures: Figures) -> None:
        """From now on `engine` answers; what it says comes through `deliver`."""
        self._engine, self._figures, self.open = engine, figures, True

    @property
    def engine(self) -> Answering:
        """What answers."""
        assert self._engine is not None
        return self._engine

    @property
    def figures(self) -> Figures:
        """What is counted."""
        assert self._figures is not None
        return self._figures

    def deliver(self, deltas: Sequence[Delta]) -> None:
        """Hand over what is new; any thread may call it. Does not block."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._sort, list(deltas))

    def _sort(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            queue = self._waiting.get(delta.id)
            if delta.done and queue is not None:  # its blocks are free now, however long ago it was cancelled
                del self._waiting[delta.id]
                self.places.give_back()
            if queue is not None:
                queue.put_nowait(delta)

    async def answers(self, asked: Asked) -> AsyncIterator[Piece]:
        """Pieces as they come, the first one empty once ranks have the request; left early, what goes on is cancelled.

        Raises:
            Refused: not taken in. Unanswered: ranks failed.
        """
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        coming: dict[str, _Answer] = {}
        began = self._clock()
        error = "Abandoned"  # by who asked, unless it comes to another end
        try:
            self._submit(asked, queue, coming)
            yield Piece(choice=0)
            while coming:
                delta = await queue.get()
                answer = coming.get(delta.id)
                if answer is None:
                    continue  # ended by a stop string
                piece = answer.take(delta, self._clock())
                if piece.finish:
                    del coming[delta.id]
                    self.engine.cancel(delta.id)  # no more of it; nothing, where it is over
                    self.figures.answered(
                        asked.operation, answer.first - began, answer.last - answer.first, answer.tokens
                    )
                yield piece
            error = ""
        except (Refused, Unanswered) as e:
            error = type(e).__name__
            raise
        finally:
            for id in coming:
                self.engine.cancel(id)
            self.figures.ended(asked.operation, self._clock() - began, len(asked.requests[0].prompt), error)

    def _submit(self, asked: Asked, queue: asyncio.Queue[Delta], coming: dict[str, _Answer]) -> None:
        if not self.open:
            raise Refused("the server is stopping: no more requests are taken", "", 503, 1)
        if self.engine.failed:
            raise Refused(self.engine.failed, "", 503)
        self.places.take(len(asked.requests))
        for number, request in enumerate(asked.requests):
            self._waiting[request.id] = queue
            coming[request.id] = _Answer(number, asked, self.tokenizer)
            try:
                self.engine.submit(request)
            except RequestError as e:
                del self._waiting[request.id], coming[request.id]
                for _ in asked.requests[number:]:
                    self.places.give_back()
                raise Refused(str(e), "", 503 if self.engine.failed else 400) from None


async def begun(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """`pieces` once ranks have the request: what is refused is raised here, before an answer has begun."""
    await anext(pieces)
    return pieces


async def whole(pieces: AsyncIterator[Piece], count: int) -> list[list[Piece]]:
    """All pieces, by answer."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    async with aclosing(await begun(pieces)) as rest:  # type: ignore[type-var]
        async for piece in rest:
            found[piece.choice].append(piece)
    return found
