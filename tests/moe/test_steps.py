"""A pass of the general layer in steps: what is asked, sent and computed in which order, and by what."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.moe.exchange.around import ChunkedBody
from ray_ep.moe.exchange.grouped import GroupedBody, transformers_experts
from ray_ep.moe.exchange.segments import Segments, add_up, add_up_in_order, order_of
from ray_ep.moe.exchange.ways import Exchange
from ray_ep.moe.site import Site
from tests.models import build

TOKENS = 24


class Log:
    """What one rank's layer does: the group's calls, the host's waits and the experts' calls, in order."""

    def __init__(self, group):
        self.calls, self.weights = [], []
        for name in ("all_to_all", "all_gather", "begin_loan", "wait"):
            setattr(group, name, self.noting(name, getattr(group, name)))

    def noting(self, name, call):
        def noted(*args):
            self.calls.append(name)
            return call(*args)

        return noted

    def experts(self, module, weights, rows, pair_weights, pairs):
        self.calls.append("experts")
        self.weights.append(weights)
        return transformers_experts(module, weights, rows, pair_weights, pairs)


def layer_of(model, group, balance=False):
    """A layer of the model on one rank, its site and its log."""
    ep = ray_ep.moe.parallelize(copy.deepcopy(model), group, balance="always" if balance else "off").ray_ep
    ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)
    site = Site(index=0, slots=ep.layers[0].slots, exchange=Exchange(fused=False), shared=ep.layers[0].shared)
    return ep.modules[0], site, Log(group)


def work_of(rank, tokens, experts=8):
    """hidden [T, H], index [T, K], weights [T, K]."""
    draw = torch.Generator().manual_seed(rank)
    hidden = torch.randn(tokens, 32, generator=draw).requires_grad_()
    return hidden, torch.rand(tokens, experts, generator=draw).topk(2).indices, torch.rand(tokens, 2, generator=draw)


def test_all_sizes_are_read_at_once_and_all_rows_are_on_their_way_before_experts_begin(ranks):
    model = build("qwen3_moe", num_hidden_layers=1)

    def work(group):
        module, site, log = layer_of(model, group)
        out = ChunkedBody(site, GroupedBody(site, log.experts), 3).compute(module, *work_of(group.rank, TOKENS))
        forward, log.calls[:] = list(log.calls), []
        out.sum().backward()
        return forward, list(log.calls)

    for forward, backward in ranks(2, work):
        sizes, pairs_and_rows, sums = ["all_to_all"], ["all_to_all"] * 2, ["all_to_all"]
        assert forward == 3 * sizes + ["wait"] + 3 * pairs_and_rows + 3 * ["experts", *sums]
        assert backward == 3 * (sums + pairs_and_rows)


def test_balance_asks_once_where_it_leaves_pairs_where_they_are_and_again_where_it_moves_them(ranks):
    model = build("qwen3_moe", num_hidden_layers=1)
    even = (torch.arange(TOKENS)[:, None] * 2 + torch.arange(2)) % 8
    skewed = torch.arange(2).expand(TOKENS, 2)  # all of it on rank 0

    def work(group):
        module, site, log = layer_of(model, group, balance=True)
        body, found = GroupedBody(site, log.experts), []
        hidden, _, weights = work_of(group.rank, TOKENS)
        for index in (even, skewed):
            log.calls.clear()
            body.compute(module, hidden, index, weights)
            found.append(log.calls[: log.calls.index("experts")])
        return found, site.shared.balancer.done.guests

    (quiet, moved), guests = ranks(2, work)[0]
    assert quiet == ["all_gather", "wait", "all_to_all", "all_to_all"]
    assert moved == ["all_gather", "wait", "all_to_all", "wait", "all_to_all", "all_to_all", "begin_loan"]
    assert guests > 0


def test_experts_get_the_ranks_own_weights_as_they_are_and_those_of_guests_beside_them(ranks):
    model = build("qwen3_moe", num_hidden_layers=1)

    def work(group):
        module, site, log = layer_of(model, group, balance=True)
        hidden, _, weights = work_of(group.rank, TOKENS)
        index = torch.arange(2).expand(TOKENS, 2)  # all of it on rank 0
        GroupedBody(site, log.experts).compute(module, hidden, index, weights).sum().backward()
        (seen,) = log.weights
        assert all(seen.own[n].data_ptr() == p.data_ptr() for n, p in module.named_parameters(recurse=False))
        return {name: rows.detach() for name, rows in seen.guests.items()}, module.gate_up_proj.grad

    (none, d_lent), (guests, d_own) = ranks(2, work)
    whole = ray_ep.moe.find_experts(model).popitem()[1]
    assert none == {}
    borrowed = guests["gate_up_proj"]
    assert borrowed.is_contiguous()
    assert [e for e in range(2) if torch.equal(borrowed[0], whole.gate_up_proj[e])], "it is one of the busy two"
    assert all(d_lent[e].any() for e in range(2)), "the guest's gradient went home"
    assert not d_own.any(), "and nothing stayed with experts that had no tokens"


def test_one_rank_alone_computes_its_tokens_where_they_lie_and_asks_nobody():
    model = build("qwen3_moe", num_hidden_layers=1)
    module, site, log = layer_of(model, SoloGroup())
    hidden, index, weights = work_of(0, TOKENS)
    index[::3, 1] = -1  # no choice
    seen = []

    def experts(module, local, rows, pair_weights, pairs):
        seen.append(rows)
        return transformers_experts(module, local, rows, pair_weights, pairs)

    w = weights.requires_grad_()
    out = GroupedBody(site, experts).compute(module, hidden, index, w)
    out.sum().backward()
    assert log.calls == []
    assert seen[0] is hidden
    got = out.detach(), hidden.grad.clone(), w.grad.clone()
    hidden.grad = w.grad = None
    kept = torch.where(index >= 0, index, 0), torch.where(index >= 0, weights, 0)
    plain = copy.deepcopy(ray_ep.moe.find_experts(model).popitem()[1])(hidden, *kept)
    plain.sum().backward()
    for mine, want in zip(got, (plain, hidden.grad, w.grad), strict=True):
        assert (mine - want).abs().max() <= 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 999),
)  # fmt: skip
def test_both_ways_to_add_up_rows_give_the_same_bits(rows, sums, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, max(sums, 1), (rows if sums else 0,), generator=draw)
    values = torch.randn(len(numbers), 5, generator=draw, dtype=torch.float64).to(dtype)
    want = add_up(values, Segments(numbers, sums))
    assert want.shape == (sums, 5)
    assert torch.equal(add_up_in_order(values, Segments.in_order(numbers, sums)), want)
    exact = torch.zeros(sums, 5, dtype=torch.float64).index_add(0, numbers, values.double())
    assert (want.double() - exact).abs().max() <= 0.01 * exact.abs().max() if sums and rows else True


@pytest.mark.parametrize("most", [3, 300, 40000])
def test_keys_of_few_bytes_sort_as_all_of_them_do(most):
    keys = torch.randint(-1, most + 1, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(order_of(keys, most), torch.argsort(keys, stable=True))
