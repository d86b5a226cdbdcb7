"""Whether a request can be computed. One that cannot would end the loop of every rank, so it is refused before.

Pure functions; whoever takes requests in calls them.
"""

from __future__ import annotations

import math

from ray_ep.rank.generate.requests import Limits, Request

MOST_LOGPROBS = 20
"""Alternatives that can be told for each token."""


def refusal(request: Request, limits: Limits) -> str:
    """Why this request cannot be computed, in one sentence; "": it can."""
    return _of_tokens(request, limits) or _of_sampling(request)


def _of_tokens(request: Request, limits: Limits) -> str:
    if not request.prompt:
        return "the prompt has no tokens: at least one is needed"
    wrong = next((t for t in (*request.prompt, *request.eos) if not 0 <= t < limits.vocabulary), None)
    if wrong is not None:
        return f"token {wrong} is not in the model's vocabulary: allowed are 0 to {limits.vocabulary - 1}"
    if request.max_new_tokens < 1:
        return f"max_new_tokens={request.max_new_tokens}: at least 1 is needed"
    length = len(request.prompt) + request.max_new_tokens
    if length > limits.context:
        return (
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones are {length}: allowed are "
            f"{limits.context} together"
        )
    return ""


def _of_sampling(request: Request) -> str:
    s = request.sampling
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        return f"temperature={s.temperature}: allowed are 0 (greedy) and above"
    if s.top_k < 0:
        return f"top_k={s.top_k}: allowed are 0 (all) and above"
    if not 0 < s.top_p <= 1:
        return f"top_p={s.top_p}: allowed is above 0, at most 1"
    if s.seed is not None and not 0 <= s.seed < 2**64:
        return f"seed={s.seed}: allowed are 0 to 2**64 - 1"
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
        return f"logprobs={request.logprobs}: allowed are 0 to {MOST_LOGPROBS}"
    return ""
