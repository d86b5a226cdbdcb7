"""Recomputation takes the recorded routes; forced routes have the load they promise; weights follow the routes."""

import copy

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

import ray_ep
from ray_ep.moe import router_losses
from ray_ep.moe.routing import Routing, forced
from tests.conftest import run_ranks
from tests.models import MODELS, VOCAB, build, gather_gradients, loss_sum, parallel_pass, placement_of, reference

IDS = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(1))


def checkpointed(model, **options):
    model.train().gradient_checkpointing_enable(options or None)
    return model


def assert_same_gradients(run, plain, model, size, kind, shards, before=None):
    """Of a checkpointed parallel model and the plain one in a single process."""
    placement = placement_of(plain, kind, size)
    expected = reference(plain, IDS)[2]
    for m, _, _, got in run(size, lambda g: parallel_pass(model, IDS, g, placement, shards, before)):
        assert all(layer.calls == 2 for layer in m.ray_ep.layers), "nothing was recomputed"
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def impatient(size, work):
    """Ranks that give up soon: if one fails or leaves the lockstep, the others wait for it in vain."""
    return run_ranks(size, work, timeout_s=5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_checkpointing_switched_on_after_parallelize_equal_those_without(name):
    model = build(name)
    assert_same_gradients(impatient, model, model, 2, "replicated", [0, 2, 5], before=checkpointed)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_switched_on_before_parallelize_equal_those_without(name, reentrant):
    plain = build(name)
    model = checkpointed(copy.deepcopy(plain), use_reentrant=reentrant)
    assert_same_gradients(impatient, plain, model, 2, "uneven", [0, 2, 5])


@pytest.mark.parametrize("shards", [[0, 0, 5], [0, 5, 5], [0, 2, 2, 5]])
def test_a_rank_without_tokens_recomputes_without_them_too(shards):
    model = build("qwen3_moe")
    assert_same_gradients(impatient, model, model, len(shards) - 1, "contiguous", shards, before=checkpointed)


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_whose_experts_get_no_token_recomputes_in_step_with_the_others(name):
    model = build(name)  # "empty_rank": it holds none
    assert_same_gradients(impatient, model, model, 2, "empty_rank", [0, 2, 5], before=checkpointed)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_router_losses_have_the_same_gradient_with_checkpointing(ranks, name):
    def one(group, checkpoint):
        model = ray_ep.moe.parallelize(build(name), group)
        ep = (checkpointed(model) if checkpoint else model).ray_ep
        part = IDS[1:3] if group.rank else IDS[:1]
        main = loss_sum(model, part)[0]
        losses = router_losses(ep.routing.logits, ep.pass_load(), ep.routing.routers, group, 3 * IDS.shape[1])
        (main / 18 + 10 * losses.aux + losses.z).backward()
        return gather_gradients(model, group)

    plain, recomputed = (ranks(2, lambda g: one(g, c))[0] for c in (False, True))
    torch.testing.assert_close(recomputed, plain, atol=1e-4, rtol=1e-4)
    no_aux = parallel_gradients_of_main_loss(ranks, name)
    gates = [n for n in plain if "gate.weight" in n]
    assert all((plain[n] - no_aux[n]).abs().max() > 1e-2 for n in gates), "the router losses had no gradient at all"


def parallel_gradients_of_main_loss(ranks, name):
    model = build(name)
    return ranks(2, lambda g: parallel_pass(model, IDS[:3], g, None, [0, 1, 3]))[0][3]


def near_tie(group, seed=0):
    """A checkpointed pass whose router weights move a little before backward; the routes taken and the gradients."""
    model = build("qwen3_moe", seed, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight.data
        weight.copy_(weight[:1] + 1e-3 * torch.randn(weight.shape, generator=generator))
    ray_ep.moe.parallelize(checkpointed(model), group)
    ep = model.ray_ep
    with ep.tracing() as trace:
        loss = model(input_ids=IDS[group.rank : group.rank + 1, :2]).logits.logsumexp(-1).sum()
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight.data
            weight += 3e-3 * torch.randn(weight.shape, generator=generator)
        loss.backward()
    return [[e for e, _ in passes] for passes in trace], gather_gradients(model, group)


def touched(traces, call):
    """Experts of each layer that any rank chose in a call."""
    return [set(torch.cat([t[i][call] for t in traces]).flatten().tolist()) for i in range(len(traces[0]))]


def with_gradient(grads):
    names = [n for n in grads if n.endswith("experts.down_proj")]
    return [set(torch.nonzero(grads[n].flatten(1).abs().sum(1)).flatten().tolist()) for n in names]


def test_a_recomputation_whose_own_choice_would_differ_takes_the_recorded_routes(ranks):
    traces, grads = zip(*ranks(2, near_tie), strict=True)
    assert all(torch.equal(first, again) for trace in traces for first, again in trace)
    assert all(g.isfinite().all() for g in grads[0].values())
    assert with_gradient(grads[0]) == touched(traces, 0)
    assert all(len(s) < 8 for s in touched(traces, 0)), "every expert was chosen: the test would show nothing"


def test_without_the_record_that_recomputation_goes_wrong(monkeypatch):
    monkeypatch.setattr(Routing, "_choose", lambda self, chosen, num_experts: chosen)
    with pytest.raises(CheckpointError, match="different metadata"):
        run_ranks(2, near_tie, timeout_s=3)


def test_two_checkpointed_passes_before_one_backward_each_replay_their_own_routes(ranks):
    plain = build("qwen3_moe")
    (loss_sum(plain, IDS[:2])[0] + loss_sum(plain, IDS[2:])[0]).backward()

    def one(group):
        model = checkpointed(ray_ep.moe.parallelize(build("qwen3_moe"), group))
        r = group.rank
        (loss_sum(model, IDS[r : r + 1])[0] + loss_sum(model, IDS[2 + r : 3 + 2 * r])[0]).backward()
        return gather_gradients(model, group)

    for got in ranks(2, one):
        torch.testing.assert_close(got, {n: p.grad for n, p in plain.named_parameters()}, atol=1e-4, rtol=1e-4)


def load(routes, experts):
    return torch.bincount(routes.flatten(), minlength=experts)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (6, 2), (16, 4), (5, 1), (4, 4)])
def test_balanced_routes_give_every_expert_the_same_load(experts, top_k):
    routes = forced("balanced", torch.zeros(experts * 6, top_k, dtype=torch.int64), experts, 0)
    assert load(routes, experts).tolist() == [6 * top_k] * experts
    assert all(len(set(r)) == top_k for r in routes.tolist()), "a token chose an expert twice"


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (6, 2), (16, 4), (5, 1)])
def test_skewed_routes_send_half_of_the_tokens_to_the_first_k_experts_and_balance_the_rest(experts, top_k):
    tokens = experts * 12
    routes = forced("skewed", torch.zeros(tokens, top_k, dtype=torch.int64), experts, 0)
    rest = tokens // 2 * top_k // experts
    assert load(routes, experts).tolist() == [tokens // 2 + rest] * top_k + [rest] * (experts - top_k)
    assert all(len(set(r)) == top_k for r in routes.tolist()), "a token chose an expert twice"


@pytest.mark.parametrize("kind", ["balanced", "skewed"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_forced_routes_do_not_depend_on_how_the_batch_is_divided(ranks, kind, name):
    def one(group, shards):
        model = ray_ep.moe.parallelize(build(name), group)
        ep, (low, high) = model.ray_ep, shards[group.rank : group.rank + 2]
        ep.routing.force, ep.routing.first_token = kind, low * IDS.shape[1]
        with ep.tracing() as trace:
            model(input_ids=IDS[low:high])
        return torch.stack([passes[0][0] for passes in trace])

    whole = ranks(1, lambda g: one(g, [0, 5]))[0]
    top_k = whole.shape[-1]
    assert torch.equal(whole[0], forced(kind, torch.zeros(35, top_k, dtype=torch.int64), 8, 0))
    for shards in ([0, 2, 5], [0, 1, 4, 5]):
        assert torch.equal(torch.cat(ranks(len(shards) - 1, lambda g: one(g, shards)), 1), whole)


def test_weights_and_the_routers_gradient_are_those_of_the_forced_choice():
    gate = build("qwen3_moe").model.layers[0].mlp.gate
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    routes = forced("balanced", torch.zeros(8, 3, dtype=torch.int64), 8, 0)
    assert not torch.equal(gate(hidden)[2].sort().values, routes.sort().values)
    scores = torch.softmax(hidden @ gate.weight.T, -1).gather(1, routes)
    expected = scores / scores.sum(-1, keepdim=True)
    slope = torch.arange(24.0).view(8, 3)
    gradient = torch.autograd.grad((expected * slope).sum(), gate.weight)[0]
    routing = Routing(1)
    routing.attach(0, gate, 8, 3)
    routing.force = "balanced"
    _, weights, chosen = gate(hidden)
    assert torch.equal(chosen, routes)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * slope).sum(), gate.weight)[0], gradient)
