"""The next token of each request from its logits: a function of (logits, sampling, seed, position) alone.

So neither the batch, nor the rank, nor the number of ranks changes what a seed gives. V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ray_ep.rank.generate.requests import Request, Sampling, TokenLogprob


def next_tokens(
    scores: torch.Tensor, requests: Sequence[Request], positions: Sequence[int]
) -> list[tuple[int, TokenLogprob | None]]:
    """For each request the token after so many tokens of its answer, and what it wants to know of that.

    Args:
        scores: [n, V] logits of the model, float32. On a GPU one host sync, and more for those that are not greedy.
    """
    greedy: list[int] = scores.argmax(-1).tolist()
    found = []
    for logits, request, position, best in zip(scores, requests, positions, greedy, strict=True):
        token = drawn(logits, request.sampling, position) if request.sampling.temperature else best
        told = None if request.logprobs is None else _logprob(logits, token, request.logprobs)
        found.append((token, told))
    return found


def drawn(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """One token drawn with the probabilities that transformers' own warpers give it; `sampling` has a seed.

    One number from a counter-based generator, against the cumulated probabilities in float64: logits that differ in
    the last bit, as other batches give, draw the same token but with a chance of that size.
    """
    assert sampling.seed is not None
    number = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    probabilities = _warped(logits[None], sampling).double().softmax(-1)[0].cumsum(0)
    found = int(torch.searchsorted(probabilities, number * probabilities[-1], right=True))
    return min(found, len(logits) - 1)


def _warped(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [1, V] as `transformers.generate` warps them."""
    ids = torch.empty(1, 0, dtype=torch.int64)  # which none of these looks at
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(min(sampling.top_k, scores.shape[-1]))(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores


def _logprob(logits: torch.Tensor, token: int, most: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(most, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
