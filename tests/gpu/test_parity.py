"""Small models and one layer on the device equal plain transformers there, by every body that computes there.

Ranks that share the GPU are in test_together.py. Not run on a GPU yet; with `--device cpu` it passes.
"""

import copy

import pytest
import torch

import ray_ep
from ray_ep.bench.contenders import Work, block
from ray_ep.collective import SoloGroup
from tests.models import MODELS, VOCAB, build, loss_sum, reference

IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
WORKS = {"cuda": Work(2048, 1024, 512, 64, 8), "cpu": Work(64, 32, 16, 8, 3)}


def run(model, ids, group, **way):
    """Loss, logits and gradients by name (contiguous placement of one rank: experts in their order)."""
    model = ray_ep.moe.parallelize(copy.deepcopy(model), group)
    model.ray_ep.exchange_by(**way)
    loss, logits = loss_sum(model, ids)
    loss = loss / ids[:, 1:].numel()
    loss.backward()
    assert all(layer.calls for layer in model.ray_ep.layers)
    return loss.detach(), logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def check_float32(name, group, device, **way):
    model, ids = build(name).to(device), IDS.to(device)
    loss, logits, grads = reference(model, ids)
    got_loss, got_logits, got_grads = run(model, ids, group, **way)
    assert abs(got_loss - loss) <= 1e-5
    assert (got_logits - logits).abs().max() <= 2e-5 * max(1.0, logits.abs().max())
    for n, g in grads.items():
        got = got_grads[n]
        assert (got is None) == (g is None) or not (g if got is None else got).any(), n
        if g is not None and got is not None:
            worst = (got - g).abs().max()
            assert worst <= 2e-5, f"{n}: {worst}"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_float32_logits_and_gradients_equal_plain_transformers(group, device, name, fused):
    check_float32(name, group, device, fused=fused)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qwen3_moe", "gpt_oss"}))
def test_every_layout_of_experts_equals_plain_transformers_on_one_rank(device, name):
    check_float32(name, SoloGroup(), device)


@pytest.mark.parametrize("way", ["flat", "all_gather"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_every_way_and_tokens_in_chunks_equal_plain_transformers(group, device, way, chunks):
    check_float32("qwen3_moe", group, device, kind=way, chunks=chunks, tokens=64)


def expert_pass(module, choice, dtype):
    """What a block's experts give for fixed choices, and all gradients, by name."""
    x, index, weights, grad = choice
    x, weights = (t.to(dtype, copy=True).requires_grad_() for t in (x, weights))
    out = module.experts(x, index, weights)
    out.backward(grad.to(dtype))
    found = {n: p.grad for n, p in module.experts.named_parameters()}
    module.zero_grad()
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad} | found


def drawn(device, dtype):
    """A block with experts, and x [T, H], index [T, K], weights [T, K], the output's gradient [T, H], all rounded."""
    work, generator = WORKS[device.type], torch.Generator().manual_seed(2)
    with torch.device(device):
        module = block(work, dtype)
    x, grad = (torch.randn(work.tokens, work.hidden, generator=generator).to(device, dtype) for _ in range(2))
    skew = torch.arange(work.experts) / 8  # the first experts have few pairs, the last many
    weights, index = (torch.randn(work.tokens, work.experts, generator=generator) + skew).topk(work.top_k)
    return module, (x, index.to(device), weights.softmax(-1).to(device, dtype), grad)


def shares_off(got, want):
    """Each tensor's distance from `want` as a share of its norm, by name."""
    return {n: float((got[n].float() - want[n].float()).norm() / want[n].float().norm()) for n in want}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_layer_in_16_bits_is_as_exact_as_plain_transformers(device, dtype, fused):
    """Both against the same rounded weights, tokens and choices in float32."""
    plain, choice = drawn(device, dtype)
    want = expert_pass(copy.deepcopy(plain).float(), choice, torch.float32)
    other = shares_off(expert_pass(plain, choice, dtype), want)
    module = ray_ep.moe.parallelize(copy.deepcopy(plain), SoloGroup())
    module.ray_ep.exchange_by(fused=fused)
    ours = shares_off(expert_pass(module, choice, dtype), want)
    assert {n: (share, other[n]) for n, share in ours.items() if not share <= 1.25 * other[n] + 1e-6} == {}
    assert max(ours.values()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_made_twice_gives_the_same_bits(device, dtype):
    plain, choice = drawn(device, dtype)
    module = ray_ep.moe.parallelize(plain, SoloGroup())
    once, twice = expert_pass(module, choice, dtype), expert_pass(module, choice, dtype)
    assert [n for n in once if not torch.equal(once[n], twice[n])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_the_tokens_beside_each_other_give_what_all_at_once_give(device, dtype):
    """Over and over, with memory of the part before: what is read before it is written shows as wrong numbers."""
    plain, choice = drawn(device, dtype)
    module = ray_ep.moe.parallelize(plain, SoloGroup())
    want = expert_pass(module, choice, dtype)
    module.ray_ep.exchange_by(chunks=4)
    for _ in range(5):
        worst = shares_off(expert_pass(module, choice, dtype), want)
        assert max(worst.values()) < (1e-5 if dtype == torch.float32 else 0.01), worst
