"""Llama 4 is the one family whose block is replaced: what is particular to it; `MODELS` has the rest tried."""

import copy

import pytest
import torch

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.errors import ModelError
from ray_ep.rank.model import meta_model
from tests.models import VOCAB, build, loss_sum

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def test_one_pair_a_token_is_computed_where_transformers_computes_all_experts():
    model = ray_ep.moe.parallelize(build("llama4_text"), SoloGroup())
    loss_sum(model, IDS)
    assert model.ray_ep.pass_load().sum(-1).tolist() == [IDS.numel()] * 2


def test_losses_that_balance_get_logits_not_scores():
    plain = build("llama4_text")
    seen = []
    for name, module in plain.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0] @ m.weight.T))
    loss_sum(plain, IDS)
    model = ray_ep.moe.parallelize(copy.deepcopy(plain), SoloGroup())
    loss_sum(model, IDS)
    for got, want in zip(model.ray_ep.routing.logits, seen[:2], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_more_than_one_expert_a_token_is_refused_in_words():
    config = build("llama4_text", num_experts_per_tok=2).config
    with pytest.raises(ModelError, match="num_experts_per_tok=2: ray_ep runs it with 1"):
        meta_model(config)


def test_the_model_that_was_copied_from_stays_as_transformers_has_it():
    plain = build("llama4_text")
    before = loss_sum(plain, IDS)[1]
    ray_ep.moe.parallelize(copy.deepcopy(plain), SoloGroup())
    assert torch.equal(loss_sum(plain, IDS)[1], before)
