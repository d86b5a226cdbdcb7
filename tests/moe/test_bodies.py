"""The three bodies of a layer, and what goes around them, against a slow reference that works token by token."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.collective import SoloGroup
from ray_ep.moe.cpu.fused import FusedBody
from ray_ep.moe.exchange.around import ChunkedBody, TwoLevelBody
from ray_ep.moe.exchange.bounded import BoundedBody
from ray_ep.moe.exchange.grouped import GroupedBody
from tests.models import build, placement_of

TOKENS, TOP_K, EXPERTS = (7, 0, 12, 5), 3, 8  # a rank has none
NODES = np.array([0, 0, 1, 1])

# how layers exchange -> the bodies, from the outside in
BODIES = {
    "fused": ({}, [FusedBody]),
    "fused, to all": ({"kind": "all_gather"}, [FusedBody]),
    "grouped": ({"fused": False}, [GroupedBody]),
    "bounded": ({"kind": "all_gather", "fused": False}, [BoundedBody]),
    "two levels of fused": ({"kind": "two_level"}, [TwoLevelBody, FusedBody]),
    "two levels of grouped": ({"kind": "two_level", "fused": False}, [TwoLevelBody, GroupedBody]),
    "parts of fused": ({"chunks": 3}, [ChunkedBody, FusedBody]),
    "parts of two levels": (
        {"chunks": 2, "kind": "two_level", "fused": False},
        [ChunkedBody, TwoLevelBody, GroupedBody],
    ),
}


def work_of(rank):
    """hidden [T, H], index [T, K], weights [T, K] and the output's gradient [T, H] of a rank."""
    draw, tokens = torch.Generator().manual_seed(rank), TOKENS[rank]
    index = torch.rand(tokens, EXPERTS, generator=draw).topk(TOP_K).indices
    index[::4, 1] = -1  # no choice
    x, g = (torch.randn(tokens, 32, generator=draw) for _ in range(2))
    return SimpleNamespace(x=x, index=index, w=torch.rand(tokens, TOP_K, generator=draw), g=g)


def token_by_token(gate_up, down, work):
    """Output and gradients of x, w, gate_up and down, in float64."""
    x, w, up, dn = (t.detach().double().requires_grad_() for t in (work.x, work.w, gate_up, down))
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for k, e in enumerate(work.index[t].tolist()):
            if e >= 0:
                gate, value = (up[e] @ x[t]).chunk(2)
                total = total + w[t, k] * (dn[e] @ (torch.nn.functional.silu(gate) * value))
        out.append(total)
    out = torch.stack(out) if out else 0 * x
    grads = torch.autograd.grad((out * work.g).sum(), [x, w, up, dn], allow_unused=True, materialize_grads=True)
    return out, *grads


@pytest.mark.parametrize("guests", [False, True], ids=["", "with guests"])
@pytest.mark.parametrize("name", BODIES)
def test_every_body_gives_what_token_by_token_gives_forward_and_backward(ranks, name, guests):
    model, (exchange, kinds) = build("qwen3_moe", num_hidden_layers=1), BODIES[name]
    whole = ray_ep.moe.find_experts(model).popitem()[1]
    wanted = [token_by_token(whole.gate_up_proj, whole.down_proj, work_of(r)) for r in range(4)]

    def one(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "contiguous", 4), node_of=NODES)
        ep, module, work = m.ray_ep, m.ray_ep.modules[0], work_of(group.rank)
        ep.exchange_by(**exchange)
        ep.balancer.active = guests
        ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)
        x, w = work.x.requires_grad_(), work.w.requires_grad_()
        out = ep.layers[0].compute(module, x, work.index, w)
        out.backward(work.g)
        bodies = [ep.layers[0].body]
        while hasattr(bodies[-1], "inner"):
            bodies.append(bodies[-1].inner)
        assert [type(b) for b in bodies] == kinds
        return out.detach(), x.grad, w.grad, module.gate_up_proj.grad, module.down_proj.grad, ep.layers[0].experts

    for rank, (*got, d_up, d_down, experts) in enumerate(ranks(4, one)):
        for mine, want in zip(got, wanted[rank], strict=False):
            assert (mine - want).abs().max() <= 1e-5 if len(want) else mine.shape == want.shape
        for mine, of_ranks in ((d_up, [w[3] for w in wanted]), (d_down, [w[4] for w in wanted])):
            assert (mine - sum(of_ranks)[experts]).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["flat", "two_level", "all_gather"])
def test_one_token_in_parts_travels_in_bfloat16(ranks, kind):
    """Messages of one row and of none, with columns of several dtypes: three weights of 2 bytes before numbers of 4."""
    dtype, tolerance = torch.bfloat16, 0.05
    model = build("qwen3_moe", num_hidden_layers=1, dtype=dtype)
    whole = ray_ep.moe.find_experts(model).popitem()[1]
    draw = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(1, n, generator=draw).to(dtype) for n in (32, 3, 32))
    work = SimpleNamespace(x=x, w=w, g=g, index=torch.tensor([[0, 7, -1]]))
    wanted = token_by_token(whole.gate_up_proj, whole.down_proj, work)

    def one(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, node_of=np.arange(group.size) // 2)
        m.ray_ep.exchange_by(kind=kind, chunks=2, fused=False)
        mine = slice(0, 1 if group.rank == 0 else 0)
        inputs = [t[mine].clone().requires_grad_() for t in (x, w)]
        out = m.ray_ep.layers[0].compute(m.ray_ep.modules[0], inputs[0], work.index[mine], inputs[1])
        out.backward(g[mine])
        return out.detach(), *(t.grad for t in inputs)

    for size in (1, 3):
        for got, want in zip(ranks(size, one)[0], wanted, strict=False):
            assert got.dtype == dtype
            assert (got - want).abs().max() <= tolerance * want.abs().max()


def saved_for_being_asked(work):
    """Bytes that a pass keeps with the tensors that it saves only so that backward asks for them."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        work()
    return [t.untyped_storage().nbytes() for t in saved if not t.numel()]


def test_what_is_saved_only_to_be_asked_for_keeps_no_memory():
    """A view of nothing keeps all that it is a view of."""
    ep = ray_ep.moe.parallelize(build("qwen3_moe", num_hidden_layers=1), SoloGroup()).ray_ep
    ep.exchange_by(kind="all_gather", chunks=2, fused=False)
    work = work_of(2)
    kept = saved_for_being_asked(
        lambda: ep.layers[0].compute(ep.modules[0], work.x.requires_grad_(), work.index, work.w)
    )
    assert kept == [0, 0, 0], "of both parts and of the whole"


def test_a_body_is_chosen_once_and_again_when_way_placement_or_dtype_change():
    model = build("qwen3_moe", num_hidden_layers=1)
    ep = ray_ep.moe.parallelize(model, SoloGroup()).ray_ep
    layer, module, work = ep.layers[0], ep.modules[0], work_of(2)

    def body():
        with torch.no_grad():
            layer.compute(module, work.x.to(module.down_proj.dtype), work.index, work.w.to(module.down_proj.dtype))
        return layer.body

    first = body()
    assert isinstance(first, FusedBody)
    assert body() is first
    with ep.tracing():
        assert isinstance(body(), FusedBody)
    assert body() is first, "a trace takes another body for a while"
    ep.exchange_by(fused=False)
    assert isinstance(body(), GroupedBody)
    ep.exchange_by(fused=True)
    again = body()
    assert again is first, "a way that is taken again finds its body, and what that has learnt"
    model.half()
    assert isinstance(body(), GroupedBody), "the fused body has no float16"
    model.float()
    ep.place(ep.placement, ep.node_of, torch.device("cpu"))
    assert isinstance(body(), FusedBody)
    assert body() is not again
