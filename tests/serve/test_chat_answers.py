"""Reasoning and calls of tools: an answer's text, in any pieces, becomes what transformers' own parser makes of it."""

import json
from types import SimpleNamespace

import pytest
from transformers.cli.serving.utils import ReasoningText, ToolCall

from ray_ep.rank.generate.requests import CANCELLED, LENGTH, STOP, Delta, Request
from ray_ep.serve.http.chat import parser_after
from ray_ep.serve.http.desk import Asked, Unanswered, _Answer
from ray_ep.serve.tokens import bytes_tokenizer

QWEN = SimpleNamespace(config=SimpleNamespace(model_type="qwen3_moe"))
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOKENIZER = bytes_tokenizer()
PREFIX = TOKENIZER("<|im_start|>assistant\n")["input_ids"]


def answered(text, size, stop=(), done=STOP, prefix=PREFIX):
    """(items, finish reasons) of an answer that comes `size` tokens at a time."""
    request = Request(id="r-0", prompt=tuple(prefix), max_new_tokens=500)
    asked = Asked(
        operation="chat",
        requests=(request,),
        stop=stop,
        parser=parser_after(list(prefix), TOKENIZER, QWEN, []),
    )
    answer, tokens = _Answer(0, asked, TOKENIZER), TOKENIZER(text)["input_ids"]
    parts = [tuple(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    pieces = [answer.take(Delta(id="r-0", tokens=p), 1.0) for p in parts]
    pieces.append(answer.take(Delta(id="r-0", done=done), 2.0))
    items = [item for piece in pieces for item in piece.items]
    return items, [p.finish for p in pieces if p.finish]


def joined(items):
    reasoning = "".join(i for i in items if isinstance(i, ReasoningText))
    plain = "".join(i for i in items if not isinstance(i, ReasoningText | ToolCall))
    calls = [(i.name, json.loads(i.arguments)) for i in items if isinstance(i, ToolCall)]
    return reasoning, plain, calls


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_text_and_calls_are_told_apart(size):
    items, finish = answered(f"<think>so</think>Sum: {CALL}", size)
    assert joined(items) == ("so", "Sum:", [("add", {"a": 1})])
    assert finish == ["tool_calls"]


def test_what_is_no_call_after_all_is_told_as_text_and_half_a_call_is_dropped():
    items, finish = answered("yes <tool_call>no json</tool_call> more", 3)
    assert joined(items)[2] == []
    assert "yes" in joined(items)[1]
    assert finish == ["stop"]
    items, finish = answered(f"yes {CALL[:20]}", 3, done=LENGTH)
    assert (joined(items), finish) == (("", "yes", []), ["length"])


def test_a_prompt_without_the_templates_anchor_does_not_become_the_answer():
    items, _ = answered("fine", 2, prefix=TOKENIZER("USER: hello")["input_ids"])
    assert joined(items) == ("", "fine", [])


def test_a_stop_string_ends_a_parsed_answer_once():
    items, finish = answered("one two END three", 2, stop=("END",))
    assert joined(items)[1].strip() == "one two"
    assert finish[0] == "stop"


def test_an_answer_that_ranks_gave_up_is_an_error():
    asked = Asked(operation="chat", requests=(Request(id="r-0", prompt=(1,), max_new_tokens=1),))
    with pytest.raises(Unanswered, match="the server is stopping"):
        _Answer(0, asked, TOKENIZER).take(Delta(id="r-0", done=CANCELLED), 1.0)
