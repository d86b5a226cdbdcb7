"""Dispatch and combine against a slow reference that works token by token; small integers, so equality is exact."""

from dataclasses import astuple, dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.moe.exchange.dispatch import Sizes, Wanted, combine, dispatch, plan_dispatch, swap
from ray_ep.moe.exchange.meter import Meter, MeteredGroup
from ray_ep.placement import Placement, contiguous, random
from tests.conftest import run_ranks

HIDDEN = 3


@dataclass
class Case:
    """R ranks with T tokens each (lists over ranks): routes [E, C], experts [T, K], values."""

    placement: Placement
    routes: list[torch.Tensor]
    index: list[torch.Tensor]  # [T, K]
    x: list[torch.Tensor]  # [T, H]
    w: list[torch.Tensor]  # [T, K] multiples of 1/8
    g: list[torch.Tensor]  # [T, H] gradient of the output


@st.composite
def cases(draw, dtype=torch.float32):
    size, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))  # more than CHOICES: columns wrap
    slots = draw(st.lists(st.integers(0, experts), min_size=size, max_size=size))
    slots[0] = max(slots[0], experts - sum(slots[1:]))
    nodes = np.asarray(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    seed = draw(st.integers(0, 2**31))
    placement, rng = random(1, experts, size, slots, seed=seed), np.random.default_rng(seed)
    x, w, g = [
        [torch.tensor(rng.integers(-8, 9, (t, n)), dtype=dtype) for t in tokens] for n in (HIDDEN, top_k, HIDDEN)
    ]
    index = [np.array([rng.permutation(experts)[:top_k] for _ in range(t)]).reshape(t, top_k) for t in tokens]
    routes = [torch.from_numpy(placement.routes(0, r, nodes)) for r in range(size)]
    return Case(placement, routes, [torch.from_numpy(i).long() for i in index], x, [v / 8 for v in w], g)


def round_trip(case, group):
    """One rank's forward and backward, expert e multiplying by e + 1."""
    r, meter = group.rank, Meter(np.zeros(group.size, np.int64), np.zeros(1, np.int64))
    x, w = case.x[r].clone().requires_grad_(), case.w[r].clone().requires_grad_()
    wire, exchange = np.zeros(group.size, np.int64), type(group).all_to_all

    def all_to_all(output, input, output_sizes, input_sizes):
        wire[:] += [n and n * input[0].nbytes for n in input_sizes]
        exchange(group, output, input, output_sizes, input_sizes)

    group.all_to_all = all_to_all
    index, routes = case.index[r], case.routes[r]
    to = routes[index, (torch.arange(len(index)) % routes.shape[1])[:, None]]
    traffic, wanted = MeteredGroup(group, meter), Wanted.of(index, to, group.size)
    agreed = plan_dispatch(wanted, w, Sizes.of(*swap(wanted, traffic).numpy()), traffic)
    rows, pair_w = dispatch(x, w, agreed)
    scaled = rows[agreed.received.row] * ((agreed.received.expert + 1).to(x.dtype) * pair_w)[:, None]
    out = combine(torch.zeros_like(rows).index_add(0, agreed.received.row, scaled), agreed)
    sent_forward = meter.sent.copy()
    (out * case.g[r]).sum().backward()
    return SimpleNamespace(
        plan=agreed, rows=rows, out=out, d_x=x.grad, d_w=w.grad, sent_forward=sent_forward, sent=meter.sent, wire=wire
    )


def destination(case, source, token, expert):
    return int(case.routes[source][expert, token % case.routes[source].shape[1]])


def partial_sum(case, source, token, rank):
    """What `rank` adds to a token: the sum over its chosen experts that this rank serves; None if it serves none."""
    out = None
    for e, w in zip(case.index[source][token].tolist(), case.w[source][token].tolist(), strict=True):
        if destination(case, source, token, e) == rank:
            out = (0 if out is None else out) + w * (e + 1) * case.x[source][token]
    return out


def visits(case, source, rank):
    """Tokens of `source` that have business on `rank`."""
    return [t for t in range(len(case.x[source])) if partial_sum(case, source, t, rank) is not None]


def stack(rows):
    return torch.stack(rows) if rows else torch.zeros(0, HIDDEN)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_every_routing_gives_the_weighted_sum_over_the_chosen_experts_and_its_gradients(case):
    size = len(case.x)
    for r, got in enumerate(run_ranks(size, lambda g: round_trip(case, g))):
        parts = [[partial_sum(case, r, t, q) for q in range(size)] for t in range(len(case.x[r]))]
        assert torch.equal(got.out, stack([sum(p for p in token if p is not None) for token in parts]))
        assert set(got.plan.received.expert.tolist()) <= set(case.placement.experts_of(0, r))
        x, w = case.x[r].clone().requires_grad_(), case.w[r].clone().requires_grad_()
        ((w * (case.index[r] + 1)).sum(1, keepdim=True) * x * case.g[r]).sum().backward()
        assert torch.equal(got.d_x, x.grad)
        assert torch.equal(got.d_w, w.grad)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_received_rows_lie_by_source_rank_then_token_and_each_pair_points_to_its_token(case):
    size = len(case.x)
    for r, got in enumerate(run_ranks(size, lambda g: round_trip(case, g))):
        owners = [(s, t) for s in range(size) for t in visits(case, s, r)]
        chosen = [(row, s, t, e) for row, (s, t) in enumerate(owners) for e in case.index[s][t].tolist()]
        pairs = [(row, e) for row, s, t, e in chosen if destination(case, s, t, e) == r]
        assert torch.equal(got.rows, stack([case.x[s][t] for s, t in owners]))
        assert list(zip(got.plan.received.row.tolist(), got.plan.received.expert.tolist(), strict=True)) == pairs


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16]).flatmap(cases))
def test_a_token_travels_once_per_remote_rank_in_both_directions_of_both_passes(case):
    size = len(case.x)

    def pairs(source, rank):
        tokens = enumerate(case.index[source].tolist())
        return sum(destination(case, source, t, e) == rank for t, chosen in tokens for e in chosen)

    row, weight = (n * case.x[0].dtype.itemsize for n in (HIDDEN, 1))
    pair = 4 + 4  # its expert, and the bits of its weight as float32
    for r, got in enumerate(run_ranks(size, lambda g: round_trip(case, g))):
        for q in set(range(size)) - {r}:
            # Forward: own tokens out, others' partial sums back. Backward: gradients of the sums out, of tokens back.
            rows = (len(visits(case, r, q)) + len(visits(case, q, r))) * row
            forward = rows + pairs(r, q) * pair
            assert got.sent_forward[q] == forward
            assert got.sent[q] == forward + rows + pairs(q, r) * weight
            assert got.wire[q] == got.sent[q] + 2 * 8  # the two sizes themselves, not metered
        assert got.sent[r] == 0  # what stays is not traffic


def by_hand():
    """Experts 0, 1 on rank 0; 2, 3 on rank 1. Rank 0: a -> 2, 0 and b -> 3, 2. Rank 1: c -> 1, 0."""
    placement = contiguous(1, 4, 2)
    return Case(
        placement,
        [torch.from_numpy(placement.routes(0, r)) for r in range(2)],
        [torch.tensor([[2, 0], [3, 2]]), torch.tensor([[1, 0]])],
        [torch.tensor([[1.0, 0, 2], [0, 1, 3]]), torch.tensor([[1.0, 1, 1]])],
        [torch.tensor([[0.5, 0.25], [1, 2]]), torch.tensor([[1.0, 0.5]])],
        [torch.tensor([[1.0, 1, 1], [1, 0, 0]]), torch.tensor([[0.0, 2, 0]])],
    )


def test_three_tokens_on_two_ranks_travel_as_worked_out_by_hand(ranks):
    first, second = ranks(2, lambda g: round_trip(by_hand(), g))
    p, q = first.plan, second.plan
    assert astuple(p.sizes) == ([1, 2], [1, 1], [1, 3], [1, 2])  # rows out and in, pairs out and in
    assert astuple(q.sizes) == ([1, 0], [2, 0], [2, 0], [3, 0])
    assert p.order.token.tolist() == [0, 0, 1]  # a to rank 0; a, b to rank 1
    assert p.order.pair.tolist() == [1, 0, 2, 3]  # pair 1 is (a, expert 0), the only one at home
    assert (p.received.row.tolist(), p.received.expert.tolist()) == ([0, 1, 1], [0, 1, 0])
    assert (q.received.row.tolist(), q.received.expert.tolist()) == ([0, 1, 1], [2, 3, 2])
    assert first.rows.tolist() == [[1, 0, 2], [1, 1, 1]]  # a, c
    assert second.rows.tolist() == [[1, 0, 2], [0, 1, 3]]  # a, b
    assert first.out.tolist() == [[1.75, 0, 3.5], [0, 10, 30]]  # a: 0.5*3 + 0.25*1; b: 1*4 + 2*3
    assert second.out.tolist() == [[2.5, 2.5, 2.5]]  # c: 1*2 + 0.5*1
    assert first.d_x.tolist() == [[1.75, 1.75, 1.75], [10, 0, 0]]
    assert first.d_w.tolist() == [[9, 3], [0, 0]]  # (e + 1) * x . g
    assert (second.d_x.tolist(), second.d_w.tolist()) == ([[0, 5, 0]], [[4, 2]])
    # 12 bytes a row, 8 a pair with its weight: a, b and three pairs go to rank 1, one sum goes to rank 0.
    assert first.sent_forward.tolist() == [0, 2 * 12 + 3 * 8 + 12]
    assert second.sent_forward.tolist() == [12 + 2 * 8 + 2 * 12, 0]
    assert [first.sent[1] - first.sent_forward[1], second.sent[0] - second.sent_forward[0]] == [44, 48]


@pytest.fixture
def spoiled(monkeypatch):
    """Every tensor that Python code leaves uninitialised is filled with NaN or a huge index; returns their names."""
    names = []

    def spoil(name, tensor):
        names.append(name)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
        made = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, made=made, **k: spoil(name, made(*a, **k)))
    return names


def test_nothing_is_read_from_a_buffer_before_it_is_written(ranks, spoiled):
    case = by_hand()
    case.index[1] = case.index[1][:0]  # rank 1 has no token, expert 1 no pair
    case.x[1], case.w[1], case.g[1] = case.x[1][:0], case.w[1][:0], case.g[1][:0]
    for first in ranks(2, lambda g: [round_trip(case, g) for _ in range(3)])[0]:
        assert first.out.tolist() == [[1.75, 0, 3.5], [0, 10, 30]]
        assert (first.d_x.tolist(), first.d_w.tolist()) == ([[1.75, 1.75, 1.75], [10, 0, 0]], [[9, 3], [0, 0]])
    assert {"new_empty", "empty_like"} <= set(spoiled)
