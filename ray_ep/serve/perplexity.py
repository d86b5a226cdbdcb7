"""Perplexity of a checkpoint on documents: which windows of them are scored, and what comes out. No Ray here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ray_ep.errors import DataError
from ray_ep.rank.generate.score import Row, Scored

_CALL = 32
"""Rows of a rank in one call: between calls it is looked whether a stop was asked for."""


class ScoringRanks(Protocol):
    """What this needs of the ranks."""

    actors: list[Any]

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """Scores in the order of `rows`."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How documents are cut: each token but a document's first is scored once, given at most `length` - 1 before it.

    Args:
        stride: tokens that a window scores, but for a document's first one, which scores all of its own; below
            `length`. The smaller, the more each token sees before it, and the longer it takes.
        packed: documents are put behind each other, each with `eos` behind it, and cut as one.
    """

    length: int
    stride: int
    packed: bool = False

    def rows(self, documents: Iterable[Sequence[int]], eos: Sequence[int]) -> Iterator[Row]:
        """The windows of token lists; a document of fewer than two tokens has none."""
        if self.packed:
            documents = [[t for d in documents for t in (*d, *eos[:1])]]
        for tokens in documents:
            done = 1
            while done < len(tokens):
                end = min(done + self.stride if done > 1 else self.length, len(tokens))
                begin = max(0, end - self.length)
                yield Row(tuple(tokens[begin:end]), done - begin)
                done = end


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was found.

    Args:
        tokens: scored. bytes: of the documents' text. loss: mean negative logarithm (nats) of a token's probability.
        seconds: of scoring, without the start.
    """

    documents: int
    tokens: int
    bytes: int
    loss: float
    seconds: float
    ranks: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        whole = self.loss * self.tokens
        more = {"perplexity": math.exp(self.loss), "bits_per_byte": whole / math.log(2) / self.bytes}
        return {**asdict(self), **more, "tokens_per_second": self.tokens / self.seconds}

    def words(self) -> str:
        """One line."""
        told = self.to_dict()
        return (
            f"perplexity {told['perplexity']:.4f} (loss {self.loss:.6f} nats a token, {told['bits_per_byte']:.4f} bits "
            f"a byte) on {self.documents} documents, {self.tokens:,} tokens: {told['tokens_per_second']:,.0f} tokens/s "
            f"on {self.ranks} ranks"
        )


def encoded(documents: Iterable[bytes], encode: Callable[[str], list[int]], vocabulary: int) -> list[list[int]]:
    """Tokens of documents. Raises DataError: there are none, or a token is not in the model's vocabulary."""
    found = [encode(d.decode("utf-8", "replace")) for d in documents]
    wrong = max((t for tokens in found for t in tokens), default=-1)
    if wrong >= vocabulary:
        raise DataError(f"token {wrong} is not in the model's vocabulary: allowed are 0 to {vocabulary - 1}")
    if not any(len(tokens) > 1 for tokens in found):
        raise DataError("no document has two tokens: there is nothing to predict")
    return found


def measure(ranks: ScoringRanks, rows: Sequence[Row], documents: int, size: int) -> Perplexity:
    """Score all rows (of so many documents, with `size` bytes of text)."""
    total, tokens, began = 0.0, sum(len(r.tokens) - r.first for r in rows), time.monotonic()
    step = _CALL * len(ranks.actors)
    for at in range(0, len(rows), step):
        total -= math.fsum(s.logprob for s in ranks.score(rows[at : at + step]))
    return Perplexity(documents, tokens, size, total / tokens, time.monotonic() - began, len(ranks.actors))
