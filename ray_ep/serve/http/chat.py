"""POST /v1/chat/completions, over transformers' own handler: its messages, its templates, its calls of tools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionUsage
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import (
    Modality,
    ReasoningText,
    ToolCall,
    build_response_parser,
    get_response_template,
)
from transformers.utils.chat_parsing.response_templates import load_response_template

from ray_ep.errors import brief
from ray_ep.serve.http.admission import Refused
from ray_ep.serve.http.bodies import ChatBody, printable, read
from ray_ep.serve.http.desk import Asked, Desk, Piece, begun, whole
from ray_ep.serve.http.events import events, usage_of
from ray_ep.serve.http.probabilities import of_chat
from ray_ep.serve.http.served import Served, asked


class Chat(ChatCompletionHandler):
    """Answers a chat.

    Args:
        manager, state: transformers' ModelManager and GenerationState, as their handlers take them.
    """

    def __init__(self, manager: Any, state: Any, served: Served, desk: Desk):
        super().__init__(manager, state)
        self._served, self._desk = served, desk

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        """An answer, or a stream of it; raises Refused, Unanswered."""
        chat = read(ChatBody, body)
        self._served.check_name(chat.model)
        prompt, parser = await asyncio.to_thread(self._prompt, chat)
        ask = asked(chat, self._served, self._desk.engine.limits, [prompt], request_id, parser)
        pieces = self._desk.answers(ask)
        if chat.stream:
            told = self._chunks(await begun(pieces), chat, ask, request_id)
            return StreamingResponse(events(told), media_type="text/event-stream")
        found = await whole(pieces, len(ask.requests))
        answer = ChatCompletion(
            id=request_id,
            created=int(time.time()),
            object="chat.completion",
            model=self._served.name,
            choices=[self._choice(number, answer, request_id) for number, answer in enumerate(found)],
            usage=usage_of([prompt], sum(piece.tokens for answer in found for piece in answer)),
        )
        return JSONResponse(answer.model_dump(exclude_none=True))

    def _prompt(self, chat: ChatBody) -> tuple[list[int], Callable[[], Any] | None]:
        """Tokens of a chat, and what makes a parser of its answer; raises Refused."""
        tokenizer = self._served.tokenizer
        template = tokenizer.chat_template
        if not template:
            raise Refused("this model has no chat template: ask /v1/completions", "messages")
        tools = [tool.model_dump(exclude_none=True) for tool in chat.tools or []]
        if chat.tool_choice == "none":
            tools = []
        if tools and "tools" not in str(template):
            raise Refused("tools: this model's chat template has no place for them", "tools")
        said = [message.model_dump(exclude_none=True) for message in chat.messages]
        try:
            messages = self.get_processor_inputs_from_messages(said, Modality.LLM)
            for message, given in zip(messages, said, strict=True):  # what templates know, and that leaves out
                message |= {key: given[key] for key in ("name", "reasoning_content") if key in given}
            prompt = tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat.chat_template_kwargs or {}),
            )["input_ids"]
        except Exception as e:  # a template may raise anything, by messages that it does not take
            raise Refused(
                f"messages: the model's chat template does not take them: {printable(brief(e))}", "messages"
            ) from None
        return prompt, parser_after(prompt, tokenizer, self._served, tools)

    def _choice(self, number: int, answer: list[Piece], request_id: str) -> Choice:
        items = [item for piece in answer for item in piece.items]
        calls = [_call(item, i, f"{request_id}-{number}") for i, item in enumerate(_of(ToolCall, items))]
        reasoning = "".join(_of(ReasoningText, items))
        message = {"role": "assistant", "content": "".join(_plain(items)), "tool_calls": calls or None}
        return Choice(
            index=number,
            message=ChatCompletionMessage.model_validate(message | {"reasoning_content": reasoning or None}),
            finish_reason=answer[-1].finish,
            logprobs=of_chat([one for piece in answer for one in piece.logprobs], self._served.tokenizer),
        )

    async def _chunks(
        self, pieces: AsyncIterator[Piece], chat: ChatBody, ask: Asked, request_id: str
    ) -> AsyncIterator[ChatCompletionChunk]:
        created, tokens, calls = int(time.time()), 0, [0] * len(ask.requests)

        def chunk(choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> ChatCompletionChunk:
            return ChatCompletionChunk(
                id=request_id,
                created=created,
                object="chat.completion.chunk",
                model=self._served.name,
                choices=choices,
                usage=usage,
            )

        def choice(number: int, said: dict[str, Any], finish: Any = "", logprobs: Any = None) -> ChunkChoice:
            delta = ChoiceDelta.model_validate(said)
            return ChunkChoice(index=number, delta=delta, finish_reason=finish or None, logprobs=logprobs)

        async with aclosing(pieces) as rest:  # type: ignore[type-var]
            yield chunk([choice(number, {"role": "assistant", "content": ""}) for number in range(len(calls))])
            async for piece in rest:
                tokens += piece.tokens
                told = of_chat(piece.logprobs, self._served.tokenizer)
                for item in piece.items:
                    if isinstance(item, ToolCall):
                        call = _call(item, calls[piece.choice], f"{request_id}-{piece.choice}")
                        said: dict[str, Any] = {"tool_calls": [{"index": calls[piece.choice], **call}]}
                        calls[piece.choice] += 1
                    else:
                        said = {"reasoning_content" if isinstance(item, ReasoningText) else "content": str(item)}
                    yield chunk([choice(piece.choice, said, logprobs=told)])
                    told = None
                if piece.finish or told:
                    yield chunk([choice(piece.choice, {}, piece.finish, told)])
            if chat.usage_at_the_end:
                yield chunk([], usage_of([ask.requests[0].prompt], tokens))


def _of(kind: type, items: list[Any]) -> list[Any]:
    return [item for item in items if isinstance(item, kind)]


def _plain(items: list[Any]) -> list[str]:
    return [item for item in items if not isinstance(item, ToolCall | ReasoningText)]


def _call(item: Any, number: int, answer_id: str) -> dict[str, Any]:
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": f"{answer_id}-call-{number}", "type": "function", "function": function}


def parser_after(
    prompt: list[int], tokenizer: Any, served: Any, tools: list[dict[str, Any]]
) -> Callable[[], Any] | None:
    """What makes a parser of the answer to a prompt; None: all of it is text.

    Args:
        served: its config is looked at, as a model's would be.
    """
    template = get_response_template(tokenizer, served)
    if template is None:
        return None
    anchored = load_response_template(template).start_anchor_re.search(tokenizer.decode(prompt))
    before = prompt if anchored else []  # of a prompt without it, all would be taken for the answer's beginning
    return lambda: build_response_parser(tokenizer, served, before, tools=tools or None)
