"""Windows over documents, and their perplexity against a loop over plain transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.errors import DataError
from ray_ep.rank.generate.score import Row, Scored
from ray_ep.serve.perplexity import Windows, encoded, measure
from tests.models import build
from tests.rank.generate.answering import prompts


def test_windows_by_hand():
    rows = list(Windows(4, 2).rows([range(7), [9], [1, 2]], ()))
    assert rows == [Row((0, 1, 2, 3), 1), Row((2, 3, 4, 5), 2), Row((3, 4, 5, 6), 3), Row((1, 2), 1)]
    assert list(Windows(4, 3, packed=True).rows([[5, 6], [7]], (0, 1))) == [Row((5, 6, 0, 7), 1), Row((6, 0, 7, 0), 3)]


@given(length=st.integers(2, 9), data=st.data(), size=st.integers(0, 40))
def test_each_token_but_the_first_is_scored_once(length, data, size):
    stride = data.draw(st.integers(1, length - 1))
    rows = list(Windows(length, stride).rows([range(size)], ()))
    assert [t for r in rows for t in r.tokens[r.first :]] == list(range(1, size))
    assert all(1 <= r.first < len(r.tokens) <= length for r in rows)
    assert all(r.first >= length - stride for r in rows[1:])  # so much is seen before, at least


class OneProcess:
    """Scores as a plain loop over transformers gives them."""

    actors = [None] * 2

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def score(self, rows):
        found = []
        for r in rows:
            loss = self.model(input_ids=torch.tensor([r.tokens]), labels=torch.tensor([self._labels(r)])).loss
            found.append(Scored(-float(loss) * (len(r.tokens) - r.first), False))
        return found

    @staticmethod
    def _labels(r):
        return [-100] * r.first + list(r.tokens[r.first :])


def test_perplexity_is_that_of_transformers():
    model, documents = build("qwen3_moe"), prompts(3, seed=1)
    rows = list(Windows(64, 32).rows(documents, ()))
    found = measure(OneProcess(model), rows, 3, 100)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([d])).logits[0, :-1], torch.tensor(d[1:]), reduction="sum"
            ) for d in documents
        ]  # fmt: skip
    tokens = sum(len(d) - 1 for d in documents)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(float(sum(losses)) / tokens, abs=1e-5)
    assert found.to_dict()["perplexity"] == pytest.approx(math.exp(found.loss))
    assert found.to_dict()["bits_per_byte"] == pytest.approx(float(sum(losses)) / math.log(2) / 100, rel=1e-5)
    assert "perplexity" in found.words()


def test_documents_that_cannot_be_scored_are_refused():
    def encode(text):
        return list(text.encode())

    assert encoded([b"ab", b""], encode, 256) == [[97, 98], []]
    with pytest.raises(DataError, match="token 98 is not in the model's vocabulary"):
        encoded([b"ab"], encode, 98)
    with pytest.raises(DataError, match="nothing to predict"):
        encoded([b"a"], encode, 256)
