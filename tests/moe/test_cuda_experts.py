"""The experts of a CUDA rank, on CPU tensors, equal a slow reference, transformers' kernel and autograd."""

import copy

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.moe.cuda import kernels_for, reference
from ray_ep.moe.cuda.experts import FusedExperts
from ray_ep.moe.cuda.products import Groups
from ray_ep.moe.exchange.grouped import GroupedBody, transformers_experts
from ray_ep.moe.site import LocalPairs, LocalWeights, Site
from tests.models import build, placement_of
from tests.moe.test_bodies import token_by_token, work_of

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
ROWS, HIDDEN, FFN, OWN, GUESTS, EXPERTS_OF_MODEL = 7, 16, 24, 4, 2, 8
NAMES = ("gate_up_proj", "down_proj")


def interpreted():
    return pytest.importorskip("ray_ep.moe.cuda.kernels", reason="Triton has wheels for Linux only")


KERNELS = {"torch": lambda: reference, "triton": interpreted}
EXPERTS = {
    "all": lambda draw: torch.randint(0, OWN + GUESTS, (19,), generator=draw),
    "one with all": lambda draw: torch.full((19,), 2),
    "some without": lambda draw: torch.tensor([0, 3, 5])[torch.randint(0, 3, (19,), generator=draw)],
    "guests only": lambda draw: torch.randint(OWN, OWN + GUESTS, (19,), generator=draw),
}


def tensors(dtype, device="cpu"):
    """rows, pair weights, and own and guests' gate_up and down."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(ROWS, HIDDEN), (19,)]
    shapes += [s for n in (OWN, GUESTS) for s in ((n, 2 * FFN, HIDDEN), (n, HIDDEN, FFN))]
    return [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]


def pairs_of(expert_row, device="cpu"):
    row = torch.tensor([0, 0, 0, 0, 0, 1, 1, 3, 3, 3, 4, 4, 4, 4, 4, 5, 6, 6, 6])[: len(expert_row)]  # none for row 2
    first = torch.searchsorted(row, torch.arange(ROWS + 1))
    of_guests = int((expert_row >= OWN).sum())
    row, first, expert_row = (t.to(device) for t in (row, first, expert_row))
    return LocalPairs(row=row, first=first, expert_row=expert_row, of_guests=of_guests)


def call(experts, pairs, rows, weights, *params, module=None):
    own, guests = (dict(zip(NAMES, part, strict=True)) for part in (params[:2], params[2:]))
    return experts(module, LocalWeights(own, guests), rows, weights, pairs)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("by", KERNELS)
def test_the_fused_experts_equal_transformers_forward_and_backward(by, kind):
    module = ray_ep.moe.find_experts(build("qwen3_moe", num_hidden_layers=1)).popitem()[1]
    device = "cuda" if by == "triton" and torch.cuda.is_available() else "cpu"
    pairs = pairs_of(EXPERTS[kind](torch.Generator().manual_seed(1)), device)
    mine, theirs = (tensors(torch.float32, device) for _ in range(2))
    got = call(FusedExperts(KERNELS[by]()), pairs, *mine)
    want = call(transformers_experts, pairs, *theirs, module=module)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(2)).to(device)
    for a, b in zip(*(torch.autograd.grad(out, x, gradient) for out, x in ((got, mine), (want, theirs))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_the_backward_written_by_hand_is_that_of_finite_differences():
    pairs, inputs = pairs_of(EXPERTS["all"](torch.Generator().manual_seed(1))), tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: call(FusedExperts(reference), pairs, *x), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32_and_the_same_bits_each_time(dtype):
    pairs, experts = pairs_of(EXPERTS["all"](torch.Generator().manual_seed(1))), FusedExperts(reference)
    narrow = tensors(dtype)
    wide = [t.detach().float().requires_grad_() for t in narrow]
    runs = []
    for inputs in (narrow, narrow, wide):
        out = call(experts, pairs, *inputs)
        runs.append([out, *torch.autograd.grad(out.float().square().mean(), inputs)])
    for a, b, want in zip(*runs, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        assert (a.float() - want).norm() <= 0.02 * want.norm()


def test_frozen_weights_cost_no_product(monkeypatch):
    monkeypatch.delattr(Groups, "outer")
    pairs, inputs = pairs_of(EXPERTS["all"](torch.Generator().manual_seed(1))), tensors(torch.float32)
    for frozen in inputs[2:]:
        frozen.requires_grad_(False)
    out = call(FusedExperts(reference), pairs, *inputs)
    d_rows, d_weights = torch.autograd.grad(out.sum(), inputs[:2])
    assert d_rows.shape == (ROWS, HIDDEN)
    assert d_weights.shape == (19,)


def test_no_pairs_give_zeros_and_a_graph():
    inputs = tensors(torch.float32)
    pairs = pairs_of(torch.zeros(0, dtype=torch.int64))
    out = call(FusedExperts(reference), pairs, inputs[0], inputs[1][:0], *inputs[2:])
    assert out.tolist() == [[0.0] * HIDDEN] * ROWS
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs, allow_unused=False))


@pytest.mark.parametrize("ends", [[3, 3, 11, 11], [0, 0, 0, 11], [11, 11, 11, 11]])
def test_torchs_grouped_kernel_and_one_product_each_give_the_same(ends):
    """On CPU torch has the grouped product as well, with the demands on layout that the one for CUDA has."""
    draw = torch.Generator().manual_seed(0)
    a, b, weight = (torch.randn(s, generator=draw).bfloat16() for s in ((11, 16), (11, 24), (4, 24, 16)))
    each, grouped = (Groups(torch.tensor(ends, dtype=torch.int32), known, reference) for known in (ends, None))
    for one in (lambda g: g.linear(a, weight), lambda g: g.times(b, weight), lambda g: g.outer(b, a)):
        torch.testing.assert_close(one(grouped), one(each), rtol=2**-7, atol=2**-7)
    assert not each.outer(b, a)[1].any()
    none = grouped.outer(b[:0], a[:0])
    assert none.shape == (4, 24, 16)
    assert not none.any()


def test_cpus_and_float64_take_the_torch_paths():
    assert kernels_for(torch.device("cpu"), torch.bfloat16) is reference
    assert kernels_for(torch.device("cuda"), torch.float64) is reference, "kernels add in float32"


def skewed(rank):
    """`work_of` a rank whose tokens all choose the first three experts, which are the first rank's."""
    work, draw = work_of(rank), torch.Generator().manual_seed(rank)
    first = 2 * (torch.arange(EXPERTS_OF_MODEL) < 3)
    work.index = (torch.rand(len(work.x), EXPERTS_OF_MODEL, generator=draw) + first).topk(3).indices
    work.index[::4, 1] = -1  # no choice
    return work


@pytest.mark.parametrize("guests", [False, True], ids=["", "with guests"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_between_the_real_exchanges_the_fused_experts_give_what_token_by_token_gives(ranks, size, guests):
    model = build("qwen3_moe", num_hidden_layers=1)
    whole = ray_ep.moe.find_experts(model).popitem()[1]
    wanted = [token_by_token(whole.gate_up_proj, whole.down_proj, skewed(r)) for r in range(size)]

    def one(group):
        placement = placement_of(model, "contiguous", size)
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement, node_of=np.zeros(size, np.int64))
        ep, module, work = m.ray_ep, m.ray_ep.modules[0], skewed(group.rank)
        ep.balancer.active = guests
        ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)
        layer, seen = ep.layers[0], []

        def experts(module, weights, rows, pair_weights, pairs):
            seen.append(bool(weights.guests))
            assert pairs.of_guests == (pairs.expert_row >= layer.slots.held).sum()
            return FusedExperts(reference)(module, weights, rows, pair_weights, pairs)

        body = GroupedBody(Site(index=0, slots=layer.slots, exchange=layer.exchange, shared=layer.shared), experts)
        x, w = work.x.requires_grad_(), work.w.requires_grad_()
        out = body.compute(module, x, work.index, w)
        out.backward(work.g)
        grads = x.grad, w.grad, module.gate_up_proj.grad, module.down_proj.grad
        return out.detach(), *grads, layer.experts, any(seen)

    results = ranks(size, one)
    assert any(borrowed for *_, borrowed in results) == (guests and size > 1)
    for rank, (*got, d_up, d_down, experts, _) in enumerate(results):
        for mine, want in zip(got, wanted[rank], strict=False):
            assert (mine - want).abs().max() <= 1e-5 if len(want) else mine.shape == want.shape
        for mine, of_ranks in ((d_up, [w[3] for w in wanted]), (d_down, [w[4] for w in wanted])):
            assert (mine - sum(of_ranks)[experts]).abs().max() <= 2e-5
