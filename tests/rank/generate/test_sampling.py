"""One token from logits: greedy, drawn as transformers draws, the same for a seed whatever else there is."""

import pytest
import torch
from transformers import GenerationConfig

from ray_ep.rank.generate.admission import refusal
from ray_ep.rank.generate.requests import Limits, Request, Sampling
from ray_ep.rank.generate.sampling import drawn, next_tokens
from tests.models import build

LIMITS = Limits(vocabulary=64, context=32, cache_tokens=128, requests=4)


def logits(seed=0, size=64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def of(sampling, **more):
    return Request(id="r", prompt=(1, 2), max_new_tokens=4, sampling=sampling, **more)


def test_no_temperature_takes_the_most_likely_token():
    both = torch.stack([logits(), logits(1)])
    best = [(int(row.argmax()), None) for row in both]
    assert next_tokens(both, [of(Sampling())] * 2, [3, 0]) == best


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 5, 1.0), (0.8, 6, 0.7)]
)
def test_draws_have_the_probabilities_of_transformers(temperature, top_k, top_p):
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k or None, "top_p": top_p}
    processors = build("qwen3_moe")._get_logits_processor(GenerationConfig(**how))
    want = processors(torch.zeros(1, 1, dtype=torch.int64), logits()[None].clone()).softmax(-1)[0]
    count = 3000
    found = torch.zeros(64)
    for seed in range(count):
        found[drawn(logits(), Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed), 0)] += 1 / count
    assert (found[want == 0] == 0).all()
    assert (found - want).abs().max() < 5 * (0.25 / count) ** 0.5  # five standard deviations of the most uncertain one


def test_a_draw_depends_on_seed_and_position_and_on_no_last_bit():
    sampling = Sampling(temperature=1.0, seed=5)
    tokens = [drawn(logits(), sampling, n) for n in range(50)]
    assert tokens == [drawn(logits() + 1e-6 * logits(1), sampling, n) for n in range(50)]
    assert tokens != [drawn(logits(), Sampling(temperature=1.0, seed=6), n) for n in range(50)]
    assert len(set(tokens)) > 5
    assert drawn(torch.tensor([0.0, 80.0]), Sampling(temperature=1e-3, seed=2**64 - 1), 0) == 1


def test_logprobs_are_of_the_model_before_sampling():
    ((token, told),) = next_tokens(logits()[None], [of(Sampling(temperature=0.3, seed=1), logprobs=2)], [0])
    plain = logits().log_softmax(-1)
    assert told.token == token
    assert told.logprob == pytest.approx(float(plain[token]))
    assert [t for t, _ in told.top] == plain.topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (1, 64)}, "token 64 is not in the model's vocabulary: allowed are 0 to 63"),
        ({"prompt": (-1,)}, "token -1"),
        ({"eos": (99,)}, "token 99"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 31}, "are 33: allowed are 32 together"),
        ({"logprobs": 21}, "allowed are 0 to 20"),
        ({"sampling": Sampling(temperature=-1)}, "temperature=-1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature=nan"),
        ({"sampling": Sampling(top_k=-1)}, "top_k=-1"),
        ({"sampling": Sampling(top_p=0)}, "top_p=0"),
        ({"sampling": Sampling(seed=-2)}, "seed=-2"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, words):
    good = {"id": "r", "prompt": (1, 2), "max_new_tokens": 30}
    assert refusal(Request(**good), LIMITS) == ""
    assert words in refusal(Request(**{**good, **change}), LIMITS)
