"""How many bytes the experts of a CUDA rank read and write between their products, counted on CPU tensors.

What is counted: each operator's operands and results that are as wide as the hidden states, over [pairs, hidden]; a
gather reads what it takes; a sum into rows reads them and writes them. Memory of a GPU sees this, but for its caches.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ray_ep
from ray_ep.moe.cuda import experts, reference
from ray_ep.moe.cuda.experts import FusedExperts
from ray_ep.moe.exchange.grouped import transformers_experts
from ray_ep.moe.site import LocalPairs, LocalWeights
from tests.models import build

HIDDEN, FFN, EXPERTS, TOKENS, TOP_K = 64, 24, 8, 96, 4
PAIRS = TOKENS * TOP_K
GATHERS = ("index_select", "index", "embedding")
INTO_ROWS = {"index_add": 3, "index_add_": 3, "index_put": 2, "index_put_": 2, "_index_put_impl_": 2}  # place of source


class Traffic(TorchDispatchMode):
    """Bytes an element of [pairs, hidden], by operator."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def count(self, name, *tensors):
        wide = [t for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 2 and HIDDEN in t.shape]
        self.bytes[name] += sum(t.numel() * t.element_size() for t in wide) / (PAIRS * HIDDEN)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, results = func._schema.name.removeprefix("aten::"), out if isinstance(out, tuple) else (out,)
        if name in GATHERS:
            self.count(name, *results, *results)
        elif name in INTO_ROWS:
            self.count(name, *[args[INTO_ROWS[name]]] * 3)
        elif not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns) and "empty" not in name:
            self.count(name, *args, *results)
        return out


class Kernels:
    """reference.py, each function counted as the one kernel that it is on a GPU."""

    def __init__(self, traffic):
        self.traffic = traffic

    def __getattr__(self, name):
        def call(*args):
            with torch.utils._python_dispatch._disable_current_modes():
                out = getattr(reference, name)(*args)
            # A segment sum reads as many rows as it has members: all of them, here.
            operands = [*args[0], *args[1:]] if isinstance(args[0], list) else args
            self.traffic.count(name, *operands, *(out if isinstance(out, tuple) else (out,)))
            return out

        return call


@pytest.fixture
def traffic_of(monkeypatch):
    monkeypatch.setattr(experts, "has_grouped_kernel", lambda like, groups: True)
    module = ray_ep.moe.find_experts(build("qwen3_moe", num_hidden_layers=1)).popitem()[1]

    def measure(make):
        """Bytes an element, by operator: of forward, and of backward."""
        draw = torch.Generator().manual_seed(0)
        shapes = [(TOKENS, HIDDEN), (PAIRS,), (EXPERTS, 2 * FFN, HIDDEN), (EXPERTS, HIDDEN, FFN)]
        rows, weights, up, down = (torch.randn(s, generator=draw).bfloat16().requires_grad_() for s in shapes)
        expert = torch.rand(TOKENS, EXPERTS, generator=draw).topk(TOP_K).indices.reshape(-1)
        row = torch.arange(PAIRS) // TOP_K
        first = torch.arange(TOKENS + 1) * TOP_K
        pairs = LocalPairs(row=row, first=first, expert_row=expert, of_guests=0)
        local = LocalWeights({"gate_up_proj": up, "down_proj": down}, {})
        gradient = torch.randn(TOKENS, HIDDEN, generator=draw).bfloat16()
        with Traffic() as forward:
            out = make(forward)(module, local, rows, weights, pairs)
        with Traffic() as backward:
            forward.bytes, kept = backward.bytes, forward.bytes  # kernels go on counting where they were told to
            out.backward(gradient)
        return kept, backward.bytes

    return measure


def test_the_fused_experts_pass_over_the_pairs_as_often_as_their_notes_say(traffic_of):
    forward, backward = traffic_of(lambda traffic: FusedExperts(Kernels(traffic)))
    rows = 2 / TOP_K  # one element of a row, shared by its pairs
    # gather 4, product 2, product 2, sum 2
    assert sum(forward.values()) == pytest.approx(10 + rows)
    # gather 4, two products 4, product 2, sum 2, gather 4, product 2
    assert sum(backward.values()) == pytest.approx(18 + rows)


def test_the_general_experts_pass_over_them_several_times_as_often(traffic_of):
    forward, backward = traffic_of(lambda traffic: transformers_experts)
    assert sum(forward.values()) > 30
    assert sum(backward.values()) > 45
