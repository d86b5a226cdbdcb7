"""What a request may say: one class for each path; a field that would have no effect is refused, never passed over.

Names and ranges are OpenAI's; `top_k`, `chat_template_kwargs` and `return_routed_experts` are those of other servers.
Imports pydantic and admission.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_ep.rank.generate.admission import MOST_LOGPROBS
from ray_ep.serve.http.admission import Refused

MOST_CHOICES = 128
"""Answers to one prompt at most, as OpenAI has it."""
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Tokens = Annotated[list[int], Field(min_length=1)]
_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[list[_Text], Field(min_length=1)]
_Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
_New = Annotated[int, Field(ge=1)]
_Zero = Annotated[float, Field(ge=0, le=0)]  # penalties: not done here


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """How a stream ends."""

    include_usage: bool = False


class _Body(_Part):
    """What both paths take."""

    model: str
    max_tokens: _New | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: _Choices | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _only_a_stream_has_options(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_at_the_end(self) -> bool:
        """Whether a stream's last piece tells how many tokens there were."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Part):
    """Which function an assistant called; arguments: JSON of an object."""

    name: str
    arguments: str


class Call(_Part):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Part):
    """One message of a chat, as a chat template is given it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Function(_Part):
    """What a model may call; parameters: a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Part):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class PlainText(_Part):
    """The one format of an answer."""

    type: Literal["text"]


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _New | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: PlainText | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_the_renderers_own(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        import inspect

        from transformers import PreTrainedTokenizerBase

        own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
        wrong = sorted(own & set(given or {}))
        if wrong:
            raise ValueError(f"{wrong[0]}: not a variable of a chat template")
        return given

    @model_validator(mode="after")
    def _alternatives_only_with_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: max_completion_tokens is given, too: give one of them")
        return self

    @property
    def alternatives(self) -> int | None:
        """Most likely tokens to tell beside each; None: no probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: (
        _Text | _Tokens | Annotated[list[_Text], Field(min_length=1)] | Annotated[list[_Tokens], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: None = None

    @property
    def alternatives(self) -> int | None:
        """Most likely tokens to tell beside each; None: no probabilities at all."""
        return self.logprobs


B = TypeVar("B", bound=_Body)


def read(kind: type[B], body: Mapping[str, Any]) -> B:
    """A body as `kind` has it.

    Raises:
        Refused: a field that is unknown, has no effect here, or has a wrong value.
    """
    try:
        return kind.model_validate(dict(body))
    except ValidationError as e:
        first = next((x for x in e.errors() if x["type"] == "extra_forbidden"), e.errors()[0])
        where = ".".join(str(x) for x in first["loc"])
        if first["type"] == "extra_forbidden":
            top = len(first["loc"]) == 1
            known = f"; allowed are {', '.join(kind.model_fields)}" if top else ""
            raise Refused(printable(f"{where}: this server has no such field{known}"), printable(where)) from None
        words = str(first["msg"]).removeprefix("Value error, ")
        field, colon, _ = words.partition(": ")
        raise Refused(printable(f"{where}: {words}" if where else words), where or field * bool(colon)) from None


def printable(text: str) -> str:
    """A text that can be sent: half characters of JSON (\\ud800) are shown as they were written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
