"""A preference is what several documents say; a quirk of one document, or chance, is none."""

import numpy as np
import pytest

from ray_ep.observe.provenance.preference import class_of, preferences

LETTERS = list("abcdefghij")


def tokens(rng, documents=12, each=200):
    """Texts of tokens and their documents."""
    texts = rng.choice([*LETTERS, "1", "2", "("], documents * each)
    return texts.tolist(), np.repeat(np.arange(documents), each)


def told(texts, documents, answered):
    return {p.text: p for p in preferences(texts, documents, np.asarray(answered))}


def test_what_many_documents_say_is_told_with_its_odds():
    rng = np.random.default_rng(0)
    texts, documents = tokens(rng)
    chance = np.where(np.isin(texts, ["1", "2"]), 0.6, 0.1)
    found = told(texts, documents, rng.random(len(texts)) < chance)
    assert set(found) == {"1", "2", "digits"}
    digits = found["digits"]
    assert digits.whole_class
    assert digits.documents == 12
    assert digits.share == pytest.approx(0.6, abs=0.06)
    assert digits.elsewhere == pytest.approx(0.1, abs=0.03)
    assert digits.odds == pytest.approx(0.6 / 0.4 / (0.1 / 0.9), rel=0.4)
    assert digits.z > found["1"].z > 3


def test_a_quirk_of_one_document_is_no_preference():
    rng = np.random.default_rng(1)
    texts, documents = tokens(rng)
    answered = rng.random(len(texts)) < 0.1
    answered |= (np.array(texts) == "a") & (documents == 5)
    assert told(texts, documents, answered) == {}
    assert "a" in told(texts, documents, answered | (np.array(texts) == "a")), "the same in all of them is one"


def test_documents_that_differ_in_both_feign_no_preference():
    """Simpson's paradox: one kind of document has many digits, and an expert that answers for all of its tokens."""
    rng = np.random.default_rng(2)
    kind = np.repeat(np.arange(12) % 2, 300)
    texts = np.where(rng.random(3600) < np.where(kind == 1, 0.8, 0.1), "1", "a")
    answered = rng.random(3600) < np.where(kind == 1, 0.7, 0.1)
    pooled = answered[texts == "1"].mean() / answered[texts == "a"].mean()
    assert pooled > 2, "counted together, digits would look preferred"
    assert told(texts.tolist(), np.repeat(np.arange(12), 300), answered) == {}


def test_chance_tells_next_to_nothing():
    said = 0
    for seed in range(40):
        rng = np.random.default_rng(100 + seed)
        texts, documents = tokens(rng)
        said += len(told(texts, documents, rng.random(len(texts)) < 0.2))
    assert said <= 4


@pytest.mark.parametrize("documents", [1, 2])
def test_fewer_than_three_documents_tell_nothing(documents):
    rng = np.random.default_rng(3)
    texts, of = tokens(rng, documents, 1000)
    assert told(texts, of, np.array(texts) == "a") == {}


def test_no_tokens_and_an_expert_that_never_or_always_answered_prefer_nothing():
    rng = np.random.default_rng(4)
    texts, documents = tokens(rng)
    assert told([], np.zeros(0, int), np.zeros(0, bool)) == {}
    assert told(texts, documents, np.zeros(len(texts), bool)) == {}
    assert told(texts, documents, np.ones(len(texts), bool)) == {}


def test_a_text_that_only_it_answers_for_has_odds_beyond_bounds():
    rng = np.random.default_rng(5)
    texts, documents = tokens(rng)
    found = told(texts, documents, np.array(texts) == "a")
    assert found["a"].odds is None
    assert (found["a"].share, found["a"].elsewhere) == (1, 0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" 42", "digits"),
        ("The", "capital letters"),
        (" the", "small letters"),
        ("你", "other letters"),
        ("\n", "line end"),
        ("  ", "white space"),
        ("+=", "marks"),
        ("x1", "others"),
        ("", "others"),
    ],
)
def test_classes_of_texts(text, name):
    assert class_of(text) == name
