"""Many prompts, answered as fast as the ranks can: `ray-ep generate`. What becomes of an answer is the caller's."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_ep.config.schema import Config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.errors import RequestError
from ray_ep.rank.generate.requests import ERROR, Delta, RankStatus, TokenLogprob
from ray_ep.serve.answers import Answer
from ray_ep.serve.checked import Checked
from ray_ep.serve.engine import Engine, engine, engine_on
from ray_ep.serve.engine_ranks import GeneratingRanks
from ray_ep.serve.prompts import Prompt

_AHEAD = 2
"""Requests that a rank has, in units of those that it computes at once: so many wait there."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a job took, from the first request to the last answer.

    Args:
        tokens: generated. exchange_share: of the time of all passes, 0 to 1, waiting for other ranks included.
        idle_share: of all passes, those in which a rank had no tokens.
    """

    answers: int
    tokens: int
    seconds: float
    ranks: int
    exchange_share: float
    idle_share: float

    @property
    def tokens_per_second(self) -> float:
        """Generated, over all ranks."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def words(self) -> str:
        """One line."""
        return (
            f"{self.answers} answers, {self.tokens:,} tokens in {self.seconds:.1f} s: {self.tokens_per_second:,.1f} "
            f"tokens/s on {self.ranks} ranks; exchange {self.exchange_share:.0%} of their passes, "
            f"{self.idle_share:.0%} of these idle"
        )


@dataclass(frozen=True, slots=True)
class Told:
    """Who hears of a job: of each answer, of what the start is at, of notes, and of new tokens of each request."""

    answer: Callable[[Answer], None]
    phase: Callable[[str], None]
    note: Callable[[str], None]
    delta: Callable[[Delta], None] = lambda delta: None


def answer_all(cfg: Config, checked: Checked, prompts: Sequence[Prompt], told: Told, interrupt: Interrupt) -> Figures:
    """Start ranks, answer all prompts, and take everything away again. Answers come in the order of their ends.

    Raises:
        RequestError: the ranks have failed; answers told before are whole.
        RankError, ClusterError: the ranks cannot be started.
        KeyboardInterrupt: a stop was asked for.
    """
    news: queue.Queue[list[Delta]] = queue.Queue()
    for note in checked.notes:
        told.note(note)
    with engine(cfg, checked, news.put, interrupt, told.phase) as ranks:
        if ranks.note:
            told.note(f"{ranks.note}: prompts of one length are computed together, each batch to its end")
        began = time.monotonic()
        tokens = _answered(ranks, prompts, news, told, interrupt)
        return _figures(ranks.status(), len(prompts), tokens, time.monotonic() - began)


def answer_on(
    cfg: Config,
    ranks: GeneratingRanks,
    prompts: Sequence[Prompt],
    answer: Callable[[Answer], None],
    interrupt: Interrupt,
) -> int:
    """The same on ranks that have formed; tokens in all."""
    news: queue.Queue[list[Delta]] = queue.Queue()
    with engine_on(cfg, ranks, news.put) as it:
        return _answered(it, prompts, news, Told(answer, _silent, _silent), interrupt)


def _silent(words: str) -> None:
    """Nobody is told."""


def _answered(
    ranks: Engine, prompts: Sequence[Prompt], news: queue.Queue[list[Delta]], told: Told, interrupt: Interrupt
) -> int:
    left, by_id = list(reversed(prompts)), {p.request.id: p for p in prompts}
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[TokenLogprob]] = {}
    most, total = _AHEAD * ranks.limits.requests * len(ranks.status()), 0
    while left or tokens:
        while left and len(tokens) < most:
            request = left.pop().request
            tokens[request.id], logprobs[request.id] = [], []
            ranks.submit(request)
        interrupt()
        try:
            deltas = news.get(timeout=0.2)
        except queue.Empty:
            continue
        for delta in deltas:
            told.delta(delta)
            tokens[delta.id] += delta.tokens
            logprobs[delta.id] += delta.logprobs
            total += len(delta.tokens)
            if delta.done == ERROR:
                raise RequestError(delta.error)
            if delta.done:
                mine = tuple(tokens.pop(delta.id)), delta.done, tuple(logprobs.pop(delta.id))
                told.answer(Answer(by_id[delta.id], *mine))
    return total


def _figures(status: Sequence[RankStatus], answers: int, tokens: int, seconds: float) -> Figures:
    passing = sum(s.pass_seconds for s in status)
    passes, idle = sum(s.passes + s.idle_passes for s in status), sum(s.idle_passes for s in status)
    exchange = sum(s.exchange_seconds for s in status) / passing if passing else 0.0
    return Figures(answers, tokens, seconds, len(status), min(exchange, 1.0), idle / passes if passes else 0.0)
