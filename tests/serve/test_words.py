"""Text of an answer in pieces is the text of the whole, cut at the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.serve.http.words import Spelled, UpToStop
from ray_ep.serve.tokens import bytes_tokenizer

AB = st.text("ab", max_size=12)


def in_pieces(pieces, stop):
    cut = UpToStop(stop)
    out = [cut.feed(piece) for piece in pieces]
    return "".join(out) + cut.rest(), cut.stopped


def cut_whole(text, stop):
    """The slow way: look after each character."""
    for end in range(1, len(text) + 1):
        begun = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begun:
            return text[: min(begun)], True
    return text, False


@given(st.lists(AB, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_however_text_is_cut_into_pieces_it_ends_before_the_first_stop_string(pieces, stop):
    assert in_pieces(list("".join(pieces)), stop) == cut_whole("".join(pieces), stop)


@given(st.lists(AB, max_size=5), st.text("ab", min_size=1, max_size=4))
def test_pieces_of_any_size_end_at_one_place(pieces, stop):
    assert in_pieces(pieces, [stop]) == cut_whole("".join(pieces), [stop])


def test_text_that_may_begin_a_stop_string_waits():
    cut = UpToStop(["</end>"])
    assert [cut.feed(t) for t in ("one <", "/e", "x <", "/end", "> more")] == ["one ", "", "</ex ", "", ""]
    assert (cut.stopped, cut.rest()) == (True, "")


@given(st.text(max_size=12))
@settings(deadline=None)
def test_a_character_of_several_tokens_comes_whole(text):
    tokenizer = bytes_tokenizer()
    spelled = Spelled(tokenizer, special=False)
    pieces = [spelled.feed([i]) for i in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + spelled.rest() == text


@pytest.mark.parametrize("cut", [1, 2])
def test_an_answer_that_ends_within_a_character_shows_that(cut):
    tokenizer = bytes_tokenizer()
    spelled = Spelled(tokenizer, special=False)
    said = spelled.feed(tokenizer("a€")["input_ids"][: 1 + cut])
    assert said == "a"
    assert spelled.rest() == "\ufffd"
