"""Probabilities of tokens as OpenAI's two paths tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_ep.rank.generate.requests import TokenLogprob

LEAST = -9999.0
"""Stands for a probability of zero, whose logarithm JSON cannot say."""


def of_chat(found: Sequence[TokenLogprob], tokenizer: Any) -> Any:
    """`logprobs` of a chat's choice; None: none were asked for."""
    from openai.types.chat.chat_completion import ChoiceLogprobs
    from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob

    if not found:
        return None

    def told(kind: Any, token: int, value: float, **more: Any) -> Any:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        part = "\ufffd" in text  # of a character: which bytes, the tokenizer does not say
        return kind(token=text, logprob=max(value, LEAST), bytes=None if part else list(text.encode()), **more)

    return ChoiceLogprobs(
        content=[
            told(
                ChatCompletionTokenLogprob,
                one.token,
                one.logprob,
                top_logprobs=[told(TopLogprob, *pair) for pair in one.top],
            )
            for one in found
        ]
    )


def of_completion(found: Sequence[TokenLogprob], tokenizer: Any, offset: int) -> Any:
    """`logprobs` of a completion's choice; None: none were asked for. offset: characters of the answer before."""
    from openai.types.completion_choice import Logprobs

    if not found:
        return None

    def text(token: int) -> str:
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    tokens = [text(one.token) for one in found]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return Logprobs(
        tokens=tokens,
        token_logprobs=[max(one.logprob, LEAST) for one in found],
        top_logprobs=[{text(token): max(value, LEAST) for token, value in one.top} for one in found],
        text_offset=offsets,
    )
