"""Conversations: the tokens are the chat template's, and those of the assistant's turns alone count."""

import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_ep.config import load_config
from ray_ep.errors import ConfigError, DataError
from ray_ep.rank.data.batch import IGNORED
from ray_ep.rank.data.corpus import load_corpus

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # as templates of reasoning models: thoughts of earlier turns are left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
RAISES = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is an expert?"},
    {"role": "assistant", "content": "One feed-forward network of a layer."},
    {"role": "user", "content": "And a slot?"},
    {"role": "assistant", "content": "Room for one expert."},
]
SHORT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory of a tokenizer with a chat template, by the template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eos>", "<|im_start|>", "<|im_end|>", "<think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [m["content"] for m in TALK] * 3
    inner.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )

    def made(template):
        path = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
        fast.chat_template = template
        fast.save_pretrained(path)
        return str(path)

    return made


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.files={path}"


def load(source, tokenizer, *overrides, length=128):
    whole = (source, f"data.tokenizer={tokenizer}", "data.format=chat", "data.held_out=0", *overrides)
    return load_corpus(load_config(None, whole).data, length)


def spoken(corpus, tokenizer, row=0, length=128):
    """Text of the predictions that count in a row, turn by turn, and of the whole row."""
    read = AutoTokenizer.from_pretrained(tokenizer)
    batch = corpus.rows.batch(np.array([row]), length)
    targets, there = batch.targets[0], batch.offsets[0] >= 0
    edges = np.flatnonzero(np.diff(targets != IGNORED, prepend=False, append=False))
    turns = [read.decode(targets[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return turns, read.decode(batch.ids[0][there])


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")], ids=["turns", "marks"]
)
def test_the_assistants_turns_count_and_nothing_else(tmp_path, tokenizer, template, end):
    path = tokenizer(template)
    corpus = load(lines(tmp_path / "a.jsonl", {"messages": TALK}), path)
    turns, whole = spoken(corpus, path)
    assert turns == [TALK[2]["content"] + end, TALK[4]["content"] + end]
    text = AutoTokenizer.from_pretrained(path).apply_chat_template(TALK, tokenize=False)
    assert text.startswith(whole), "the template's own words"
    assert len(corpus.train) - 1 == (corpus.rows.batch(np.array([0]), 128).offsets >= 0).sum(), "the last predicts none"


def test_jsonl_parquet_and_a_dataset_give_the_same_and_other_columns_do_no_harm(tmp_path, tokenizer):
    path, rows = tokenizer(MARKED), [{"messages": TALK, "id": 1}, {"messages": SHORT, "id": 2}]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    sources = [lines(tmp_path / "a.jsonl", *rows), f"data.files={tmp_path}/a.parquet", f"data.dataset={tmp_path}/saved"]
    first, *others = (load(source, path) for source in sources)
    for other in others:
        assert np.array_equal(first.train, other.train)
        assert np.array_equal(first.rows.counted, other.rows.counted)
    assert first.documents == 2
    assert len(first.rows) == 1, "packed by default"
    assert len(load(sources[0], path, "data.pack=off").rows) == 2


def test_a_template_that_rewrites_earlier_turns_is_told_where_it_does_and_taken_for_one_turn(tmp_path, tokenizer):
    path = tokenizer(FORGETS)
    with pytest.raises(DataError, match=r"document 1: the chat template .* before message 3 otherwise .*generation"):
        load(lines(tmp_path / "a.jsonl", {"messages": TALK}), path)
    corpus = load(lines(tmp_path / "b.jsonl", {"messages": SHORT}), path)
    assert spoken(corpus, path)[0] == ["Hello!<|im_end|>\n"]


def test_a_long_conversation_is_cut_at_the_end_and_told_and_one_without_a_turn_in_reach_left_out(tmp_path, tokenizer):
    path = tokenizer(CHATML)
    late = [{"role": "user", "content": "so " * 60}, {"role": "assistant", "content": "yes"}]
    corpus = load(lines(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": late}), path, length=40)
    assert "2 of them cut at batch.length=40" in corpus.source
    assert len(corpus.rows) == 1
    with pytest.raises(DataError, match=r"no token that counts within batch.length=40"):
        load(lines(tmp_path / "b.jsonl", {"messages": late}), path, length=40)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "hi"}, "line 2: no field data.messages_field='messages'; it has text"),
        ({"messages": "hi"}, "holds a str, not a list of messages"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 of .* has no role: .* it has from, value"),
        ({"messages": ["hi"]}, "message 1 .* has no role: .* it has a str"),
        ({"messages": TALK[:2]}, "has no message of role assistant"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_place(tmp_path, tokenizer, row, says):
    with pytest.raises(DataError, match=f"a.jsonl, line 2.*{says}|{says}"):
        load(lines(tmp_path / "a.jsonl", {"messages": SHORT}, row), tokenizer(MARKED))


def test_a_tokenizer_without_a_template_and_a_template_that_refuses_are_told(tmp_path, tokenizer):
    source = lines(tmp_path / "a.jsonl", {"messages": SHORT})
    with pytest.raises(DataError, match=r"has no chat template, which data.format=chat needs"):
        load(source, tokenizer(None))
    with pytest.raises(DataError, match=r"document 1: the chat template .* refuses it: roles must alternate"):
        load(source, tokenizer(RAISES))
    text = tmp_path / "a.txt"
    text.write_text("no table at all\n" * 30)
    with pytest.raises(DataError, match=r"is no table with data\.messages_field='messages'"):
        load(f"data.files={text}", tokenizer(MARKED))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.tokenizer=x"], "give the conversations as data.files or data.dataset"),
        (["data.files=a.jsonl"], "data.tokenizer=bytes has no chat template"),
        (["data.files=a.jsonl", "data.tokenizer=x", "data.pack=stream"], "cuts conversations anywhere"),
    ],
)
def test_settings_that_do_not_go_with_conversations_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_config(None, ["data.format=chat", *overrides])
