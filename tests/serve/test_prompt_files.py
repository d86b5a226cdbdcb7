"""Files of prompts and of answers: what is read, what is refused, and how a second start goes on."""

import json

import pytest
from transformers import AutoConfig

from ray_ep.config import load_config
from ray_ep.errors import DataError, SaveError
from ray_ep.placement import contiguous
from ray_ep.rank.generate.requests import Sampling
from ray_ep.serve.answers import Answer, AnswerFile
from ray_ep.serve.checked import Checked, Text
from ray_ep.serve.prompts import Defaults, Reader
from tests.models import BASE, MODELS

BYTES = Text(lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace"), None, 256)


def reader(**overrides):
    config = AutoConfig.for_model("qwen3_moe", **{**BASE, **MODELS["qwen3_moe"], "vocab_size": 256})
    checked = Checked(config, contiguous(2, 8, 2), BYTES, (0,), 64, ())
    return Reader(load_config(), checked, Defaults(8, Sampling(temperature=0.5, seed=10)))


def read(tmp_path, *lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(x) if not isinstance(x, str) else x for x in lines))
    return reader().file(file)


def test_a_line_says_what_differs_from_the_defaults(tmp_path):
    first, second, third = read(
        tmp_path, {"prompt": "ab"}, "", {"prompt": [1, 2], "id": "x", "top_k": 3, "max_new_tokens": 2},
        {"prompt": "c", "temperature": 0, "seed": 1, "logprobs": 2},
    )  # fmt: skip
    assert first.request.prompt == (97, 98)
    assert first.request.id == "0"
    assert first.request.sampling == Sampling(temperature=0.5, seed=10)
    assert first.request.eos == (0,)
    assert second.request.sampling == Sampling(temperature=0.5, top_k=3, seed=11)
    assert (second.request.id, second.request.prompt, second.request.max_new_tokens) == ("x", (1, 2), 2)
    assert third.request.sampling == Sampling(temperature=0.0, seed=1)
    assert third.request.logprobs == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("3", "line 2: expected an object"),
        ({"text": "a"}, "unknown key 'text'"),
        ({"id": 3}, "give prompt"),
        ({"prompt": "a", "messages": []}, "one of the two"),
        ({"prompt": [1, "a"]}, "expected text or a list of token ids"),
        ({"prompt": [1, 300]}, "token 300 is not in the model's vocabulary"),
        ({"prompt": "x" * 60}, "allowed are 64 together"),
        ({"prompt": "a", "top_k": 1.5}, "top_k=1.5: expected a whole number"),
        ({"prompt": "a", "temperature": "hot"}, "temperature='hot': expected a number"),
        ({"prompt": "a", "top_p": 2}, "top_p=2.0"),
        ({"prompt": ""}, "no tokens"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat template"),
        ({"messages": "a"}, "expected a list of objects"),
        ({"prompt": "a", "id": 0}, "both have id '0'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    with pytest.raises(DataError, match=r"prompts\.jsonl") as e:
        read(tmp_path, {"prompt": "good"}, line)
    assert words in str(e.value)


def test_a_line_ends_at_a_newline_alone(tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes('{"prompt": "a\u2028b\u0085c"}\r\n'.encode())
    (only,) = reader().file(tmp_path / "prompts.jsonl")
    assert only.given == "a\u2028b\u0085c"


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="no line has a prompt"):
        read(tmp_path, "")
    with pytest.raises(DataError, match="No such file"):
        reader().file(tmp_path / "none")


def answered(prompt):
    return Answer(prompt, (*b"yes", 0), "stop", ()).to_dict(BYTES.decode, (0,))


def test_a_second_start_goes_on_behind_the_last_whole_line(tmp_path):
    prompts, out = read(tmp_path, *({"prompt": f"p{i}é"} for i in range(4))), tmp_path / "out.jsonl"
    with AnswerFile(out, prompts) as file:
        assert file.left == prompts
        file.write(answered(prompts[2]))
        file.write(answered(prompts[0]))
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"id": "1", "pro')
    with AnswerFile(out, prompts) as file:
        assert [p.request.id for p in file.left] == ["1", "3"]
        file.write(answered(prompts[3]))
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [x["id"] for x in lines] == ["2", "0", "3"]
    assert lines[0] == {"id": "2", "prompt": "p2é", "text": "yes", "tokens": [*b"yes", 0], "done": "stop"}
    assert out.read_bytes().startswith(whole)


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    prompts, out = read(tmp_path, {"prompt": "a"}), tmp_path / "out.jsonl"
    for text, words in (
        ('{"x": 1}\n', "is no answer"),
        ('{"id": "7", "prompt": "a"}\n', "another prompt"),
        ('{"id": "0", "prompt": "b"}\n', "another prompt"),
    ):
        out.write_text(text)
        with pytest.raises(DataError, match=words):
            AnswerFile(out, prompts)
        assert out.read_text() == text
    with pytest.raises(DataError, match="no such directory"):
        AnswerFile(tmp_path / "no" / "out", prompts)
    with pytest.raises(DataError, match="directory"):
        AnswerFile(tmp_path, prompts)


def test_a_disk_that_is_full_is_told(tmp_path):
    prompts = read(tmp_path, {"prompt": "a"})
    file = AnswerFile(tmp_path / "out.jsonl", prompts)
    file.path = type(tmp_path)("/dev/full")
    with file, pytest.raises(SaveError, match="No space left"):
        file.write(answered(prompts[0]))
