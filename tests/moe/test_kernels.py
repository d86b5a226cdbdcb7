"""The compiled kernels and the fused layer equal their pure-torch counterparts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ray_ep
from ray_ep.moe.cpu import gemm, kernels
from ray_ep.moe.cpu.gemm import Gemm, Packed
from ray_ep.moe.cpu.pool import Pool
from tests.models import VOCAB, build, even_shards, parallel_pass, placement_of


def bits(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_backward_equal_autograd(dtype):
    g = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(40, 96, generator=g) * 4).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -20.0])  # saturated on both sides
    weight, dh = torch.rand(40, generator=g), torch.randn(40, 48, generator=g).to(dtype)
    a, w = gate_up.float().clone().requires_grad_(), weight.clone().requires_grad_()
    gate, up = a.chunk(2, -1)
    want = w[:, None] * torch.nn.functional.silu(gate) * up
    want.backward(dh.float())
    h, again, d, d_weight = torch.empty_like(dh), torch.empty_like(dh), torch.empty_like(gate_up), torch.empty(40)
    kernels.swiglu(bits(gate_up), weight.numpy(), bits(h))
    kernels.swiglu_backward(bits(gate_up), weight.numpy(), bits(dh), bits(d), bits(again), d_weight.numpy())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(h.float(), want.detach(), **close)
    torch.testing.assert_close(again.float(), h.float(), **close)
    torch.testing.assert_close(d.float(), a.grad, **close)
    torch.testing.assert_close(d_weight, w.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", range(1, 11))
def test_weight_gradients_of_few_and_of_many_rows_are_the_product(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows, n, generator=generator).to(dtype) for n in (6, 9))
    out = torch.empty(6, 9, dtype=dtype)
    Gemm().gradient(a, b, out, add=False)
    torch.testing.assert_close(out, a.t() @ b)
    Gemm().gradient(a, b, out, add=True)
    torch.testing.assert_close(out, 2 * (a.t() @ b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_sums_add_in_float32_and_round_once(dtype):
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    start, member = np.array([0, 2, 2, 7]), np.array([8, 0, 1, 2, 3, 4, 1])
    out = torch.empty(3, 5, dtype=dtype)
    kernels.sum_segments(bits(rows), start, member, bits(out))
    want = torch.stack([rows[member[a:b]].float().sum(0) for a, b in pairwise(start)])
    torch.testing.assert_close(out, want.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 32]), st.integers(0, 999))
def test_plans_send_each_token_once_a_rank_and_lose_no_pair(tokens, top_k, ranks, align, seed):
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(6)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k), np.int64)
    index[rng.random(index.shape) < 0.2] = -1  # no choice
    routes = rng.integers(0, ranks, (6, 5)).astype(np.int32)
    to = np.where(index < 0, -1, routes[index, np.arange(tokens)[:, None] % 5])
    rank = int(rng.integers(ranks))
    index = index.astype(np.int64)
    assert (kernels.serving_ranks(index, routes) == to).all()
    rows_out, pairs_out, row_token, pair, bits = kernels.plan_send(index, to.astype(np.int32), ranks, rank)
    order = [r for r in range(ranks) if r != rank] + [rank]
    want = [(r, t) for r in order for t in range(tokens) if (to[t] == r).any()]
    assert list(row_token) == [t for _, t in want]
    assert list(rows_out) == [sum(r == x for x, _ in want) for r in range(ranks)]
    row_pairs = [(to[t] == r).sum() for r, t in want]
    assert list(np.nonzero(bits >> 15)[0]) == [sum(row_pairs[:i]) for i in range(len(want))]
    assert list(bits & 0x7FFF) == list(index.reshape(-1)[pair])
    assert list(pair) == [t * top_k + k for r, t in want for k in range(top_k) if to[t, k] == r]
    assert list(pairs_out) == [(to == r).sum() for r in range(ranks)]

    row_of, weight = rng.permutation(6), rng.random(len(pair)).astype(np.float32)
    slot = row_of[index.reshape(-1)[pair]]
    offsets, row, sorted_weight, segment, place = kernels.plan_receive(bits, weight, row_of, 6, align)
    counts = np.bincount(slot, minlength=6)
    assert all(n <= size < n + align for n, size in zip(counts, np.diff(offsets), strict=True))
    assert len(set(place)) == len(place)
    for i in range(len(row_pairs)):
        for p in range(segment[i], segment[i + 1]):
            q = place[p]
            assert offsets[slot[p]] <= q < offsets[slot[p] + 1]
            assert (row[q], sorted_weight[q]) == (i, weight[p])
    assert sorted_weight.sum() == pytest.approx(weight.sum(), rel=1e-5), "padding weighs nothing"


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_layer_equals_the_general_one(ranks, size, dtype):
    model = build("qwen3_moe", dtype=dtype, num_hidden_layers=1)  # with more, rounding sends tokens elsewhere
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    placement, shards = placement_of(model, "replicated", size), even_shards(4, size)

    def general(m):
        m.ray_ep.exchange_by(fused=False)

    fused = ranks(size, lambda g: parallel_pass(model, ids, g, placement, shards))
    plain = ranks(size, lambda g: parallel_pass(model, ids, g, placement, shards, general))
    close = 1e-5 if dtype == torch.float32 else 0.06
    for (_, loss, logits, grads), (_, want_loss, want_logits, want_grads) in zip(fused, plain, strict=True):
        scale = want_logits.float().abs().max()
        assert (logits.float() - want_logits.float()).abs().max() <= close * max(scale, 1)
        assert abs(loss - want_loss) <= close
        for n, g in want_grads.items():
            assert (grads[n].float() - g.float()).abs().max() <= close * max(1, g.float().abs().max()), n


def test_a_buffer_is_handed_out_again_only_when_nothing_refers_to_it():
    pool, like = Pool(), torch.empty(0)
    a = pool.take(300, 300, like=like)
    view, address = a[5:].view(-1), a.data_ptr()
    del a
    assert pool.take(300, 300, like=like).data_ptr() != address, "a view still uses it"
    array = view.numpy()
    del view
    assert pool.take(300, 300, like=like).data_ptr() != address, "an array still uses it"
    del array
    assert address in {pool.take(300, 300, like=like).data_ptr(), *(b.data_ptr() for b in pool._buffers)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_compiled_in_a_step(ranks, dtype):
    compiled = [k for k in vars(kernels).values() if hasattr(k, "signatures")]
    kernels.warm()
    before = {k.__name__: len(k.signatures) for k in compiled}
    assert len(before) >= 7
    model = build("qwen3_moe", dtype=dtype)
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    placement = placement_of(model, "replicated", 2)
    ranks(2, lambda g: parallel_pass(model, ids, g, placement, [0, 0, 4]))
    assert {k.__name__: len(k.signatures) for k in compiled} == before


def test_bytes_on_the_wire_are_the_distinct_token_rank_pairs_and_little_more(ranks):
    tokens, hidden, top_k = 64, 512, 4
    model = build("qwen3_moe", hidden_size=hidden, num_experts_per_tok=top_k, head_dim=128)

    def work(group):
        m = ray_ep.moe.parallelize(model_copy(model), group, balance="off")
        experts = m.ray_ep.modules[0]
        g = torch.Generator().manual_seed(group.rank)
        index = torch.rand(tokens, 8, generator=g).argsort(1)[:, :top_k]
        x = torch.randn(tokens, hidden, generator=g, requires_grad=True)
        out = experts(x, index, torch.rand(tokens, top_k, generator=g).requires_grad_())
        forward = m.ray_ep.meter.sent.copy()
        out.sum().backward()
        routes = m.ray_ep.layers[0].slots.routes
        to = routes[index, (torch.arange(tokens) % routes.shape[1])[:, None]]
        visits = [int((to == r).any(1).sum()) for r in range(3)]
        pairs = [int((to == r).sum()) for r in range(3)]
        return forward, m.ray_ep.meter.sent - forward, visits, pairs

    found = ranks(3, work)
    for me, (forward, backward, visits, pairs) in enumerate(found):
        for r in range(3):
            if r == me:
                assert forward[r] == backward[r] == 0
                continue
            theirs, their_pairs = found[r][2][me], found[r][3][me]
            rows = (visits[r] + theirs) * hidden * 4  # tokens go there, partial sums of theirs go back
            meta = 6 * pairs[r]
            assert forward[r] == rows + meta
            assert backward[r] == rows + 4 * their_pairs
            assert meta < 0.02 * visits[r] * hidden * 4


def model_copy(model):
    import copy

    return copy.deepcopy(model)


@pytest.mark.parametrize("library", gemm.LIBRARIES[torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_products_are_the_same_by_whichever_library(library, rows):
    products = Gemm()
    products.library[torch.float32] = library if gemm.has_onednn() else "torch"
    g = torch.Generator().manual_seed(rows)
    x, weight, out = torch.randn(rows, 24, generator=g), torch.randn(40, 24, generator=g), torch.empty(rows, 40)
    for b in (weight.t(), weight.t().contiguous()):
        products.mm(x, b, out=out)
        assert torch.allclose(out, x @ weight.t(), atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_widened_products_of_bfloat16_are_rounded_once(monkeypatch, rows):
    """Where the processor has no bfloat16: in parts of a few rows, added up in float32."""
    products = Gemm()
    products.library[torch.bfloat16] = "widened"
    monkeypatch.setattr(gemm, "_AT_ONCE", 20)
    g = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(*shape, generator=g).bfloat16() for shape in ((rows, 24), (40, 24)))
    out, exact = torch.empty(rows, 40, dtype=torch.bfloat16), (x.double() @ weight.double().t())
    for b in (weight.t(), weight.t().contiguous()):
        products.mm(x, b, out=out)
        assert torch.allclose(out.double(), exact, rtol=2**-8, atol=1e-5)
    total, before = torch.empty(40, 24, dtype=torch.bfloat16), torch.randn(40, 24, generator=g).bfloat16()
    exact = out.double().t() @ x.double()
    products.gradient(out, x, total, add=False)
    assert torch.allclose(total.double(), exact, rtol=2**-8, atol=1e-4)
    products.gradient(out, x, total.copy_(before), add=True)
    assert torch.allclose(total.double(), before.double() + exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("least", "reuse"), [(1, 0), (1, 1 << 13), (1 << 18, 0)], ids=["packed", "many rows", "too small to pack"]
)
def test_packed_rows_multiply_like_plain_ones_and_can_be_added_and_given_up(monkeypatch, least, reuse):
    monkeypatch.setattr(gemm, "_LARGE", least)
    products = Gemm()
    products.reuse[torch.float32] = reuse
    weight, x, out = torch.randn(3, 40, 24), torch.randn(5, 24), torch.empty(5, 40)
    packed, made, pack = Packed(weight[:2], products), [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w, n: made.append(w) or pack(w, n))
    packed.append(weight[2])
    for row in (0, 1, 2, 2, 1, 0):
        packed.mm(x, row, out)
        assert torch.allclose(out, x @ weight[row].t(), atol=1e-5)
    assert len(made) == (3 if least == 1 and reuse == 0 else 0), "at the first use, where that pays"
    packed.cut(2)
    assert packed.rows == 2
