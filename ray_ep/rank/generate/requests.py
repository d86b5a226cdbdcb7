"""What is asked of the ranks and what comes back, between processes: plain values. Imports nothing of the package.

Tokens are ids of the model's vocabulary; text is the business of whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The same seed gives the same tokens, on any number of ranks and in any batch.

    Args:
        temperature: 0: the most likely token (greedy), and the rest has no effect.
        top_k: choose among so many of the most likely; 0: among all.
        top_p: choose among the fewest that have this probability together; above 0, at most 1.
        seed: of the draws, from 0; None: another one for each request.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to go on from.

    Args:
        id: of whoever asks; no other open request has it.
        prompt: at least one token.
        max_new_tokens: ends there at the latest; at least 1.
        eos: tokens that end the answer; the one that did is part of it.
        logprobs: for each token, tell its logarithmic probability and those of so many of the most likely ones (0 to
            20); None: tell none. Of the model as it is, before temperature, top_k and top_p.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    eos: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and (token, the same) of the most likely ones, highest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


GOES_ON, STOP, LENGTH, CANCELLED, ERROR = "", "stop", "length", "cancelled", "error"
"""What `Delta.done` says: not done; a token of `eos` came; max_new_tokens are there; cancelled; see `Delta.error`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of a request. The last one of each has `done`, and none follows it.

    Args:
        tokens: since the delta before; may be empty in the last one.
        logprobs: one for each of `tokens`, if they were asked for; else empty.
    """

    id: str
    tokens: tuple[int, ...] = ()
    done: str = GOES_ON
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may have; `refusal` in admission.py holds a request against it.

    Args:
        vocabulary: token ids are below it.
        context: most tokens of a prompt and its answer together: the model's own limit, or a rank's cache.
        cache_tokens: tokens whose keys and values one rank keeps, for all its requests together.
        requests: that one rank computes at once; more wait.
    """

    vocabulary: int
    context: int
    cache_tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank at a moment.

    Args:
        outstanding_tokens: of its open requests: prompts not read yet and answers not given yet, at most.
        requests: open, those that wait included.
        cached_tokens: of its cache that are in use.
        passes: over its own tokens since the start. idle_passes: in which it only took part in the exchange.
        tokens: generated since the start.
        pass_seconds: in all passes. exchange_seconds: of that in exchanges, waiting for other ranks included.
    """

    rank: int
    outstanding_tokens: int = 0
    requests: int = 0
    cached_tokens: int = 0
    passes: int = 0
    idle_passes: int = 0
    tokens: int = 0
    pass_seconds: float = 0.0
    exchange_seconds: float = 0.0
    epoch: int = 0
    placement_version: int = 0
