"""The real openai client against the server: what it is told is what plain transformers generates."""

import threading

import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI

from tests.models import build
from tests.serve.scene import serving, words

SAY = [{"role": "user", "content": "w10 w11 w12"}]
PROMPT = [4, 10, 11, 12, 5, 6]


@pytest.fixture(scope="module")
def model():
    return build("mixtral")


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as (url, engine, desk):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        client.engine, client.desk = engine, desk
        yield client


def greedy(model, prompt, count):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def spoken(tokens):
    return words().decode(tokens, skip_special_tokens=True)


def chat(client, **more):
    return client.chat.completions.create(model="tiny", messages=more.pop("messages", SAY), **more)


def test_models_lists_the_one_that_is_served(server):
    assert [m.id for m in server.models.list()] == ["tiny"]


def test_a_chat_is_what_transformers_generates(server, model):
    answer = chat(server, temperature=0, max_tokens=12)
    want = greedy(model, PROMPT, 12)
    assert answer.choices[0].message.content == spoken(want)
    assert answer.choices[0].finish_reason == ("stop" if want[-1] == 2 else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), len(want))


def test_a_stream_says_the_same_and_ends_with_usage_only_if_asked(server, model):
    chunks = list(chat(server, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    want = greedy(model, PROMPT, 12)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == spoken(want)
    assert [c.choices for c in chunks][-1] == []
    assert chunks[-1].usage.completion_tokens == len(want)
    assert len({c.id for c in chunks}) == 1
    plain = list(chat(server, temperature=0, max_tokens=3, stream=True))
    assert [c.usage for c in plain] == [None] * len(plain)
    assert plain[-1].choices[0].finish_reason == "length"


def test_completions_take_text_tokens_and_several_prompts(server, model):
    def ask(prompt):
        answer = server.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=5)
        return [c.text for c in answer.choices]

    one, two = (spoken(greedy(model, p, 5)) for p in ([4, 10], [7, 8, 9]))
    assert ask("w4 w10") == ask([4, 10]) == [one]
    assert ask(["w4 w10", "w7 w8 w9"]) == ask([[4, 10], [7, 8, 9]]) == [one, two]


def test_n_answers_are_drawn_each_by_its_own_seed(server):
    def draw(**more):
        answer = chat(server, temperature=1.5, max_tokens=8, **more)
        return [c.message.content for c in sorted(answer.choices, key=lambda c: c.index)]

    three = draw(seed=5, n=3)
    assert len(set(three)) == 3
    assert three == draw(seed=5, n=3)
    assert three[1:] == draw(seed=6, n=2)


def test_a_stop_string_ends_the_text_before_it_and_the_computing(server, model):
    want = spoken(greedy(model, PROMPT, 12)).split()
    stop = next(w for i, w in enumerate(want) if i > 2 and w not in want[:i])
    text = " ".join(want).split(f" {stop}")[0]
    answer = chat(server, temperature=0, max_tokens=12, stop=[f" {stop}", "never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")
    chunks = list(chat(server, temperature=0, max_tokens=12, stop=f" {stop}", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text


def test_probabilities_are_those_of_the_model(server, model):
    want = greedy(model, PROMPT, 4)
    logits = (
        model.requires_grad_(False)(torch.tensor([PROMPT + want[:-1]])).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
    )
    told = chat(server, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [t.token for t in told] == [f"w{i}" for i in want]
    assert [t.logprob for t in told] == pytest.approx([float(logits[i, t]) for i, t in enumerate(want)], abs=1e-5)
    assert all(t.top_logprobs[0].token == t.token and len(t.top_logprobs) == 2 for t in told)
    answer = server.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=4, logprobs=1)
    told = answer.choices[0].logprobs
    assert told.token_logprobs == pytest.approx([float(logits[i, t]) for i, t in enumerate(want)], abs=1e-5)
    assert told.text_offset[0] == 0
    assert told.tokens == [f"w{i}" for i in want]


def test_many_at_once_are_answered_each_as_if_it_were_alone(server, model):
    prompts = [[4, 10 + i, 11] for i in range(6)]
    found = [None] * len(prompts)

    def ask(i):
        stream = server.completions.create(
            model="tiny", prompt=prompts[i], temperature=0, max_tokens=6 + i, stream=True
        )
        found[i] = "".join(c.choices[0].text for c in stream if c.choices)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    assert found == [spoken(greedy(model, p, 6 + i)) for i, p in enumerate(prompts)]
    assert server.desk.places.taken == 0


@pytest.mark.parametrize(
    ("more", "says", "param"),
    [
        ({"extra_body": {"nonsense": 1}}, "nonsense: this server has no such field; allowed are model, ", "nonsense"),
        ({"logit_bias": {"5": 100}}, "logit_bias: ", "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: ", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'", ""),
        ({"top_logprobs": 3}, "top_logprobs: only with logprobs=true", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options: only with stream=true", "stream_options"),
        ({"temperature": -1}, "temperature: ", "temperature"),
        ({"max_tokens": 59}, "max_tokens=59: messages has 6 tokens, .* allowed are 1 to 58", "max_tokens"),
        ({"messages": [{"role": "user", "content": "w9 " * 70}]}, "messages has 73 tokens", "messages"),
        ({"messages": []}, "messages: ", "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: .* no place for them", "tools"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template: not a variable", ""),
        ({"n": 9}, "9 answers to one request: this server has places for 8", "n"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_exact_cause(server, more, says, param):
    rounds = server.engine.rounds
    with pytest.raises(BadRequestError, match=says) as e:
        chat(server, **more)
    assert not param or e.value.param == param
    assert e.value.type == "invalid_request_error"
    assert server.engine.rounds == rounds, "no work was done for it"


def test_tokens_beyond_the_vocabulary_and_other_models_are_refused(server):
    with pytest.raises(BadRequestError, match="prompt: token 64 is not of this model: allowed are 0 to 63"):
        server.completions.create(model="tiny", prompt=[4, 64])
    with pytest.raises(NotFoundError, match="model 'gpt-4' is not served here: allowed is 'tiny'"):
        server.chat.completions.create(model="gpt-4", messages=SAY)


def test_ids_are_our_own_so_that_two_clients_cannot_share_one(server):
    asked = [chat(server, max_tokens=1, extra_headers={"x-request-id": "mine"}) for _ in range(2)]
    assert len({a.id for a in asked} | {"mine"}) == 3
    assert [a._request_id for a in asked] == [a.id for a in asked]
