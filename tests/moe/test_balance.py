"""Router losses and correction biases: the global figures by hand or by transformers' own, at every number of ranks."""

import types

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import ray_ep
from ray_ep.moe import router_losses, update_bias
from ray_ep.moe.balance.router import probabilities
from tests.models import VOCAB, build

LAYERS, TOKENS, EXPERTS, TOP_K = 3, 11, 6, 2
KINDS = ("layer", "pooled", "off")
SPLITS = [[0, 11], [0, 4, 11], [0, 11, 11], [0, 3, 3, 11], [0, 1, 7, 11]]  # two with a rank that has no token


def some_logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(TOKENS, EXPERTS, generator=generator) * 2 for _ in range(LAYERS)]


def load_of(logits, top_k=TOP_K):
    """[L, E] tokens that chose each expert."""
    return torch.stack([torch.bincount(x.topk(top_k).indices.flatten(), minlength=EXPERTS) for x in logits])


def split_losses(ranks, logits, split, kind, routers=None, name="aux"):
    """The loss summed over ranks that have logits[split[r] : split[r + 1]], and its gradient of all logits."""

    def one(group):
        mine = [x[split[group.rank] : split[group.rank + 1]].clone().requires_grad_() for x in logits]
        losses = router_losses(mine, load_of(mine), routers or [None] * LAYERS, group, TOKENS, kind)
        part = getattr(losses, name)
        part.backward()
        return part.detach(), [x.grad for x in mine]

    parts = ranks(len(split) - 1, one)
    return sum(p for p, _ in parts), [torch.cat(g) for g in zip(*[grads for _, grads in parts], strict=True)]


def whole(logits, loss):
    """The same of a formula over all tokens in one process."""
    leaves = [x.clone().requires_grad_() for x in logits]
    value = loss(leaves)
    value.backward()
    return value.detach(), [x.grad for x in leaves]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert all(g.abs().max() > 1e-4 for g in got[1])  # a gradient that is zero everywhere would show nothing


def by_layer(logits):
    """Sum over layers of E * sum_e f_e P_e, each sum written out."""
    total = 0
    for x in logits:
        chosen = x.topk(TOP_K).indices.tolist()
        for e in range(EXPERTS):
            share = sum(e in c for c in chosen) / TOKENS
            total = total + EXPERTS * share * sum(torch.softmax(row, 0)[e] for row in x) / TOKENS
    return total


@pytest.mark.parametrize("split", SPLITS)
def test_pooled_loss_and_its_gradient_are_those_of_transformers_however_tokens_are_split(ranks, split):
    logits = some_logits()
    expected = whole(logits, lambda x: load_balancing_loss_func(tuple(x), EXPERTS, TOP_K))
    assert_same(split_losses(ranks, logits, split, "pooled"), expected)


@pytest.mark.parametrize("split", SPLITS)
def test_layer_loss_and_its_gradient_are_the_sum_of_each_layers_own_however_tokens_are_split(ranks, split):
    logits = some_logits(1)
    expected = whole(logits, by_layer)
    assert_same(split_losses(ranks, logits, split, "layer"), expected)
    assert (
        abs(expected[0] - LAYERS * whole(logits, lambda x: load_balancing_loss_func(tuple(x), EXPERTS, TOP_K))[0])
        > 1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_z_loss_is_the_mean_square_of_logsumexp_over_tokens_and_layers(ranks, split, kind):
    logits = some_logits(2)
    expected = whole(logits, lambda x: sum(t.exp().sum().log() ** 2 for y in x for t in y) / (TOKENS * LAYERS))
    assert_same(split_losses(ranks, logits, split, kind, name="z"), expected)


def test_layer_loss_by_hand_for_two_tokens_and_two_experts(ranks):
    # Both tokens choose expert 0 with probability 3/4 and 1/2 + 1/10: f = (1, 0), P_0 = (0.75 + 0.6) / 2.
    logits = [torch.tensor([[3.0, 1.0], [6.0, 4.0]]).log()]
    loss = ranks(1, lambda g: router_losses(logits, torch.tensor([[2, 0]]), [None], g, 2))[0]
    assert loss.aux == pytest.approx(2 * 1 * 0.675)
    z = (torch.tensor(4.0).log() ** 2 + torch.tensor(10.0).log() ** 2) / 2
    assert loss.z == pytest.approx(float(z))


def test_perfect_balance_costs_k_a_layer_and_off_costs_nothing(ranks):
    logits = [torch.zeros(6, EXPERTS)] * LAYERS
    load = torch.full((LAYERS, EXPERTS), 2)
    losses = {k: ranks(1, lambda g: router_losses(logits, load, [None] * LAYERS, g, 6, k))[0].aux for k in KINDS}
    assert losses["layer"] == pytest.approx(TOP_K * LAYERS)
    assert losses["pooled"] == pytest.approx(TOP_K)
    assert losses["off"] == 0


def test_layers_without_logits_are_left_out_of_every_loss(ranks):
    logits = some_logits(3)
    some = [logits[0], None, logits[2]]
    load = load_of(logits)
    with_gap = ranks(1, lambda g: router_losses(some, load, [None] * 3, g, TOKENS))[0]
    without = ranks(1, lambda g: router_losses(logits[::2], load[::2], [None] * 2, g, TOKENS))[0]
    none = ranks(1, lambda g: router_losses([None] * 3, load, [None] * 3, g, TOKENS))[0]
    assert (with_gap.aux, with_gap.z) == (without.aux, without.z)
    assert (none.aux, none.z) == (0, 0)


@pytest.mark.parametrize("kind", [*KINDS, "transformers"])
@pytest.mark.parametrize("graph", [(True, False), (False, True), (False, False)])
def test_a_loss_without_graph_is_the_same_figure_and_leaves_the_others_gradient_alone(ranks, kind, graph):
    def one(group, wanted):
        leaves = [x.requires_grad_() for x in some_logits(5)]
        made = router_losses(leaves, load_of(leaves), [None] * LAYERS, group, TOKENS, kind, TOP_K, wanted)
        losses = [made.aux, made.z]
        for loss, there, asked in zip(losses, wanted, graph, strict=True):
            assert there or not loss.requires_grad
            if loss.requires_grad and asked:
                loss.backward()
        return [x.detach() for x in losses], [x.grad for x in leaves]

    (figures, gradients), (expected, wanted) = (ranks(1, lambda g: one(g, w))[0] for w in (graph, (True, True)))
    assert figures == expected
    assert all(g is w is None or torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))


def test_the_callers_load_is_left_as_it_was(ranks):
    for dtype in (torch.int64, torch.float32):
        load = [load_of(some_logits()).to(dtype) for _ in range(2)]
        before = load[0].clone()
        ranks(2, lambda g: router_losses(some_logits(), load[g.rank], [None] * LAYERS, g, 2 * TOKENS))
        assert torch.equal(load[0], before), f"a {dtype} load was summed over ranks in place"


@pytest.mark.parametrize("split", [[0, 11], [0, 4, 11], [0, 3, 3, 11]])
def test_routers_with_a_correction_bias_are_balanced_on_normalised_sigmoids(ranks, split):
    router = types.SimpleNamespace(e_score_correction_bias=torch.zeros(EXPERTS))
    logits = some_logits(4)

    def formula(leaves):
        load, total = load_of(leaves), 0
        for x, counts in zip(leaves, load, strict=True):
            for t in x:
                scores = 1 / (1 + torch.exp(-t))
                total = total + EXPERTS * (counts / TOKENS * scores / scores.sum()).sum() / TOKENS
        return total

    assert_same(split_losses(ranks, logits, split, "layer", [router] * LAYERS), whole(logits, formula))
    assert torch.allclose(probabilities(logits[0], router).sum(-1), torch.ones(TOKENS))
    assert torch.allclose(probabilities(logits[0], None), torch.softmax(logits[0], -1))


def test_bias_rises_under_the_mean_load_and_falls_above_it():
    router = types.SimpleNamespace(e_score_correction_bias=torch.tensor([0.5, 0, 0, -0.5]))
    plain = types.SimpleNamespace()
    load = torch.tensor([[9, 9, 9, 9], [4, 0, 2, 2]])
    assert update_bias([plain, router], load, 0.1) == 1
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.4, 0.1, 0, -0.5]))
    assert update_bias([plain, router, None], torch.cat([load, load]), 0.0) == 0
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.4, 0.1, 0, -0.5]))


def test_losses_and_biases_of_a_model_are_the_same_at_every_number_of_ranks_and_with_an_idle_one(ranks):
    ids = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(0))

    def one(group, shards):
        model = ray_ep.moe.parallelize(build("deepseek_v3"), group)
        ep, part = model.ray_ep, ids[shards[group.rank] : shards[group.rank + 1]]
        if len(part):
            model(input_ids=part)
        else:
            with ep.idle():
                model(input_ids=ids[:1])
        logits = [x[: part.numel()] for x in ep.routing.logits]  # an idle rank's are of padding
        losses = router_losses(logits, ep.pass_load(), ep.routing.routers, group, ids.numel())
        sums, load = torch.stack([losses.aux, losses.z]).detach(), ep.pass_load()
        group.all_reduce(sums)
        group.all_reduce(load)
        updated = update_bias(ep.routing.routers, load, 0.01)
        return sums, updated, torch.stack([r.e_score_correction_bias for r in ep.routing.routers])

    expected = ranks(1, lambda g: one(g, [0, 5]))[0]
    assert expected[1] == 2
    before = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in build("deepseek_v3").model.layers[1:]])
    assert (expected[2] - before).abs().max() == pytest.approx(0.01, abs=1e-6)
    for shards in ([0, 2, 5], [0, 0, 5], [0, 2, 2, 5]):
        for sums, _, biases in ranks(len(shards) - 1, lambda g: one(g, shards)):
            torch.testing.assert_close(sums, expected[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(biases, expected[2])
