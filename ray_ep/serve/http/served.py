"""The model that is served, as its front knows it: its name, its tokenizer, what its own files say of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ep.rank.generate.requests import Limits, Request, Sampling
from ray_ep.serve.http.admission import Refused, new_tokens
from ray_ep.serve.http.bodies import ChatBody, CompletionBody
from ray_ep.serve.http.desk import Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model without its weights.

    Attributes:
        name: what requests call it. tokenizer: transformers' fast one.
        config, generation_config: transformers' own. eos: ids that end an answer.
        created: when it was served first, seconds since 1970.
    """

    name: str
    tokenizer: Any
    config: Any
    generation_config: Any
    eos: tuple[int, ...]
    created: int

    def check_name(self, name: str) -> None:
        """Raise Refused where a request is for another model."""
        if name != self.name:
            raise Refused(f"model {name!r} is not served here: allowed is {self.name!r}", "model", 404)

    def sampling(self, body: ChatBody | CompletionBody, number: int) -> Sampling:
        """How answer `number` of a request is drawn: as it says, else as the model's own files, else as OpenAI does."""
        own = self.generation_config
        drawn = own is not None and own.do_sample

        def given(name: str, otherwise: float) -> Any:
            said = getattr(body, name)
            theirs = getattr(own, name, None) if drawn else None
            return next(x for x in (said, theirs, otherwise) if x is not None)

        return Sampling(
            temperature=float(given("temperature", 1.0)),
            top_k=int(given("top_k", 0)),
            top_p=float(given("top_p", 1.0)),
            seed=None if body.seed is None else body.seed + number,
        )


def asked(
    body: ChatBody | CompletionBody,
    served: Served,
    limits: Limits,
    prompts: Sequence[Sequence[int]],
    request_id: str,
    parser: Callable[[], Any] | None = None,
) -> Asked:
    """What ranks are asked, one request for each answer: `body.n` of the first prompt, then of the next.

    Raises:
        Refused: something that ranks could not compute.
    """
    chat = isinstance(body, ChatBody)
    where = "messages" if isinstance(body, ChatBody) else "prompt"
    wanted, wanted_by = body.max_tokens, "max_tokens"
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted, wanted_by = body.max_completion_tokens, "max_completion_tokens"
    requests: list[Request] = []
    for prompt in prompts:
        most = new_tokens(prompt, wanted, limits, where, wanted_by)
        if wanted is None and not chat:
            most = min(most, 16)  # OpenAI's own default there
        for _ in range(body.n or 1):
            number = len(requests)
            requests.append(
                Request(
                    id=f"{request_id}-{number}",
                    prompt=tuple(prompt),
                    max_new_tokens=most,
                    sampling=served.sampling(body, number),
                    eos=served.eos,
                    logprobs=body.alternatives,
                )
            )
    operation = "chat" if chat else "text_completion"
    return Asked(operation=operation, requests=tuple(requests), stop=body.stops, parser=parser)
