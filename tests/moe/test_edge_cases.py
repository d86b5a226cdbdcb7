"""Empty ranks and experts, bfloat16, several passes before a backward, plain SGD, and what cannot be parallelized."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.dbrx import DbrxConfig, DbrxForCausalLM

from ray_ep.collective import SoloGroup
from ray_ep.errors import ModelError, PlacementError
from ray_ep.moe import parallelize
from ray_ep.placement import contiguous
from tests import models as tiny
from tests.conftest import slow
from tests.models import BASE, build, placement_of

IDS = torch.randint(3, tiny.VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
MODELS = ["qwen3_moe", "deepseek_v3"]


def parallel_passes(ranks, model, size, kind):
    placement, shards = placement_of(model, kind, size), tiny.even_shards(5, size)
    return ranks(size, lambda g: tiny.parallel_pass(model, IDS, g, placement, shards))


def share_of_loss(model, ids, rank=0, shards=(0, None)):
    """This rank's part of the mean loss of ids [B, L]; with no rows it takes part idly."""
    part = ids[shards[rank] : shards[rank + 1]]
    if len(part):
        return tiny.loss_sum(model, part)[0] / ids[:, 1:].numel()
    with model.ray_ep.idle():
        return 0 * model(input_ids=ids[:1, :2], use_cache=False).logits.sum()


def gradients(model, group=None):
    if group is not None:
        return tiny.gather_gradients(model, group)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def rows_here(model, name, full):
    """The rows of an expert parameter [E, ...] that this rank holds; other parameters as they are."""
    layers = model.ray_ep.layers if hasattr(model, "ray_ep") else []
    return next((full[x.experts] for x in layers if name.startswith(x.name + ".")), full)


def sgd(model, batches, group=None, placement=None, shards=(0, None)):
    """Plain SGD; returns the gradients of each step and the model."""
    model, steps = copy.deepcopy(model), []
    model = parallelize(model, group, placement) if group else model
    for ids in batches:
        model.zero_grad()
        share_of_loss(model, ids, group.rank if group else 0, shards).backward()
        steps.append(gradients(model, group))
        for n, p in model.named_parameters():
            p.data -= 0.02 * rows_here(model, n, steps[-1][n])
    return steps, model


def assert_sgd_is_the_same(ranks, model, batches, size, kind, shards):
    steps, trained = sgd(model, batches)
    moved = [(p - q).abs().max() > 1e-3 for p, q in zip(trained.parameters(), model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2, "too small steps would show nothing"
    results = ranks(size, lambda g: sgd(model, batches, g, placement_of(model, kind, size), shards))
    pairs = len(batches) * IDS.numel() * model.config.num_experts_per_tok
    assert all(sum(m.ray_ep.meter.pairs for _, m in results) == pairs), "padding was computed, or tokens were not"
    for got, m in results:
        torch.testing.assert_close(got, steps, atol=2e-5, rtol=1e-4)
        for n, p in m.named_parameters():
            torch.testing.assert_close(p, rows_here(m, n, trained.get_parameter(n)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parameters_after_steps_of_plain_sgd_are_those_of_one_process(ranks, name, size):
    assert_sgd_is_the_same(ranks, build(name), [IDS, IDS.roll(1, 1)], size, "replicated", tiny.even_shards(5, size))


@pytest.fixture
def poison():
    """Torch fills all memory that it hands out uninitialised with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield torch.empty(1)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shards", [[0, 0, 5], *slow([0, 2, 5], [0, 5, 5, 5], [0, 0, 0, 5])])
def test_ranks_without_tokens_or_experts_keep_in_step_over_several_steps_in_poisoned_memory(ranks, poison, shards):
    assert poison.isnan().all()
    batches = [IDS.roll(step, 1) for step in range(4)]
    for name, kind in (("qwen3_moe", "shuffled"), ("deepseek_v3", "empty_rank")):
        assert_sgd_is_the_same(ranks, build(name), batches, len(shards) - 1, kind, shards)


def build_with_a_hot_and_a_cold_expert(name):
    """Every token chooses expert 0, none chooses expert 5."""
    model = build(name)
    model.model.embed_tokens.weight.data[:, 0] = 4.0  # one coordinate that is large and positive in every token
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[0] = 1.0
        gate = getattr(layer.mlp, "gate", None)
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias[[0, 5]] = torch.tensor([10.0, -10.0])
        elif gate is not None:
            gate.weight.data[:, 0] = torch.tensor([2.0, 0, 0, 0, 0, -2.0, 0, 0])
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_expert_without_tokens_has_a_zero_gradient_and_one_with_all_has_the_whole(ranks, name, size):
    model = build_with_a_hot_and_a_cold_expert(name)
    _, logits, expected = tiny.reference(model, IDS)
    for kind in ("contiguous", "replicated"):
        results = parallel_passes(ranks, model, size, kind)
        load = sum(m.ray_ep.pass_load() for m, *_ in results)
        assert load[:, [0, 5]].tolist() == [[IDS.numel(), 0]] * len(load)
        torch.testing.assert_close(torch.cat([r[2] for r in results]), logits, atol=1e-5, rtol=0)
        for m, _, _, grads in results:
            torch.testing.assert_close(grads, expected, atol=1e-5, rtol=0)
            assert all((grads[n][0] != 0).any() and (grads[n][5] == 0).all() for n in m.ray_ep.expert_parameter_names())


@pytest.mark.parametrize("name", MODELS)
def test_the_router_has_the_whole_gradient_without_any_auxiliary_loss(ranks, name):
    model = build(name)
    expected = tiny.reference(model, IDS)[2]
    for _, _, _, grads in parallel_passes(ranks, model, 3, "contiguous"):
        for n in [n for n in expected if "layers.0" in n or "embed" in n or "gate.weight" in n]:
            assert expected[n].abs().max() > 1e-4
            torch.testing.assert_close(grads[n], expected[n], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("shards", [[0, 2, 5], [0, 0, 5]])
def test_two_passes_before_one_backward_and_two_backward_calls_sum_the_gradients(ranks, accumulate, shards):
    model = build("qwen3_moe")

    def one(group=None, shards=(0, None)):
        m = copy.deepcopy(model)
        m = parallelize(m, group, placement_of(model, "replicated", 2)) if group else m
        losses = (share_of_loss(m, b, group.rank if group else 0, shards) for b in (IDS, IDS.roll(2, 1)[:, :6]))
        [x.backward() for x in losses] if accumulate else sum(losses).backward()
        return gradients(m, group)

    for got in ranks(2, lambda g: one(g, shards)):
        torch.testing.assert_close(got, one(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_is_as_exact_on_several_ranks_as_in_one_process(ranks, name, size):
    low, exact = build(name, dtype=torch.bfloat16), build(name)
    exact.load_state_dict(low.state_dict())  # the same rounded weights, computed with in float32
    (_, true, true_grads), (_, single, single_grads) = tiny.reference(exact, IDS), tiny.reference(low, IDS)
    results = parallel_passes(ranks, low, size, "shuffled")

    def error(value, truth):  # relative, root mean square: one token that routes otherwise does not decide
        return float((value.float() - truth).norm() / truth.norm())

    # Partial sums are rounded once more a rank, and summed in float32: measured 1.1 times the error of one process.
    assert error(torch.cat([r[2] for r in results]), true) < 1.25 * error(single, true)
    for n in results[0][0].ray_ep.expert_parameter_names():
        assert error(results[0][3][n], true_grads[n]) < 1.25 * error(single_grads[n], true_grads[n])


def test_models_without_experts_behind_transformers_interface_are_refused_by_name():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no experts"):
        parallelize(LlamaForCausalLM(LlamaConfig(**BASE)), SoloGroup())
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    config = DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config=experts,
    )
    with pytest.raises(ModelError, match=r"DbrxForCausalLM has no experts.*DbrxExperts"):
        parallelize(DbrxForCausalLM(config), SoloGroup())


def test_a_model_is_parallelized_once_and_only_by_a_placement_that_fits():
    model = build("mixtral")
    for layers, experts, size in ((1, 6, 1), (2, 5, 1), (2, 6, 2)):
        with pytest.raises(PlacementError, match=f"{layers} layers x {experts} experts on {size} ranks"):
            parallelize(model, SoloGroup(), contiguous(layers, experts, size))
    assert torch.equal(model(IDS).logits, build("mixtral")(IDS).logits), "a refused model is left as it was"
    parallelize(model, SoloGroup())
    with pytest.raises(ModelError, match="MixtralForCausalLM is already parallelized"):
        parallelize(model, SoloGroup())


def test_a_moe_block_alone_can_be_parallelized(ranks):
    block = build("qwen3_moe").model.layers[0].mlp  # a Qwen3MoeSparseMoeBlock
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(1))

    def one(rows, group=None):
        b, part = copy.deepcopy(block), x[rows].clone().requires_grad_()
        out = (parallelize(b, group) if group else b)(part)
        (out.square().sum() / 1000).backward()  # gradients near one
        return out.detach(), part.grad, gradients(b, group)

    (out, d_x, grads), parts = one(slice(5)), (slice(2), slice(2, 5))
    for rows, got in zip(parts, ranks(2, lambda g: one(parts[g.rank], g)), strict=True):
        torch.testing.assert_close(got, (out[rows], d_x[rows], grads), atol=1e-5, rtol=1e-5)
