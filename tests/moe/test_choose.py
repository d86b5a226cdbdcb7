"""The exchange is chosen by measurement: on links of a given shape each way wins somewhere and is then taken."""

import copy

import numpy as np
import pytest
import torch

import ray_ep
from ray_ep.collective import Group
from ray_ep.moe import KINDS, choose, settle
from ray_ep.moe.exchange.choose import CLEARLY, fastest, take, ways_to_try
from tests.models import build, placement_of

NODES = np.array([0, 0, 1, 1])
FAST = (0.0, 1e12)


class Clock:
    """Of one rank."""

    now = 0.0

    def __call__(self):
        return self.now


class Shaped(Group):
    """A group whose links inside a node and between nodes have a latency, seconds, and a bandwidth, bytes a second.

    Each exchange takes as long as the rank's own bytes do, on a clock that nothing else moves, so that the machine's
    load decides nothing. Links to one class of peers share the bandwidth, latencies run beside each other.
    """

    def __init__(self, inner, clock, near=FAST, far=FAST):
        self.inner, self.clock, self.near, self.far = inner, clock, near, far
        self.rank, self.size, self.epoch, self.members = inner.rank, inner.size, inner.epoch, inner.members

    def _take(self, bytes_to):
        seconds, latency = 0.0, 0.0
        for to, n in enumerate(bytes_to):
            if to != self.rank and n:
                link = self.near if NODES[to] == NODES[self.rank] else self.far
                latency, seconds = max(latency, link[0]), seconds + n / link[1]
        self.clock.now += latency + seconds

    def all_to_all(self, output, input, output_sizes, input_sizes):
        row = input.element_size() * int(np.prod(input.shape[1:]))
        self._take([n * row for n in input_sizes])
        self.inner.all_to_all(output, input, output_sizes, input_sizes)

    def all_gather(self, input):
        self._take([input.nbytes] * self.size)
        return self.inner.all_gather(input)

    def all_reduce(self, tensor, op="sum"):
        self.inner.all_reduce(tensor, op)

    def broadcast(self, tensor, source):
        self.inner.broadcast(tensor, source)

    def send(self, tensor, to, limit_s=None):
        self.inner.send(tensor, to, limit_s)

    def receive(self, tensor, source, limit_s=None):
        self.inner.receive(tensor, source, limit_s)

    def barrier(self):
        self.inner.barrier()

    def split(self, color):
        return Shaped(self.inner.split(color), self.clock, self.near, self.far)

    def abort(self):
        self.inner.abort()

    def close(self):
        self.inner.close()


def work_of(rank, tokens, top_k):
    generator = torch.Generator().manual_seed(rank)
    index = torch.rand(tokens, 8, generator=generator).topk(top_k).indices
    return torch.randn(tokens, 32, generator=generator), index, torch.rand(tokens, top_k, generator=generator)


def on_links(ranks, near, far, tokens, top_k, **options):
    """[rank] (choice, its ExpertParallel) after a choice on the work of four ranks on two nodes."""
    model = build("qwen3_moe")

    def one(group):
        m = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "contiguous", 4), node_of=NODES)
        clock = Clock()
        groups = {"links": Shaped(group, clock, near, far)}
        work = work_of(group.rank, tokens, top_k)
        return choose(m.ray_ep, work, 0, groups, backward=True, clock=clock, **options), m.ray_ep

    return ranks(4, one)


# latency and bandwidth inside a node and between nodes, tokens of a rank, top_k
WINS = {
    # 4 rounds of messages instead of 7, 16 tokens cost nothing
    "all_gather": ((0.012, 1e9), (0.012, 1e9), 16, 2),
    # a token has one expert: to everybody would be four times the bytes, by way of a gateway twice
    "flat": ((0.0, 3e6), (0.0, 3e6), 600, 1),
    # 6 of 8 experts: a token goes to both ranks of the other node, over a slow link once instead of twice
    "two_level": ((0.0, 1e9), (0.0, 3e6), 400, 6),
}


@pytest.mark.parametrize("kind", WINS)
def test_each_way_wins_somewhere_and_is_then_taken_by_all_ranks_alike(ranks, kind):
    results = on_links(ranks, *WINS[kind])
    first = results[0][0]
    assert first.kind == kind, first.words()
    assert {t.kind for t in first.timings} == set(KINDS)
    assert min(first.timings, key=lambda t: t.seconds).kind == kind
    for choice, ep in results:
        assert (choice.kind, choice.timings) == (kind, first.timings), "the slowest rank's seconds, on every rank"
        assert ep.exchange.kind == kind
        assert all(layer.group.present.far == WINS[kind][1] for layer in ep.layers)
        assert 0 < choice.seconds < 30
        assert not choice.pinned
    assert first.words().startswith(f"{kind} over links, by ")


def test_a_pinned_way_is_kept_where_another_would_win_and_costs_no_time(ranks):
    for choice, ep in on_links(ranks, *WINS["flat"], kinds=("two_level",)):
        assert (choice.kind, choice.pinned, choice.note, ep.exchange.kind) == ("two_level", True, "", "two_level")
        assert ep.counters._enabled


def test_the_faster_transport_is_taken_for_all_that_travels(ranks):
    model = build("qwen3_moe")

    def one(group):
        ep = ray_ep.moe.parallelize(copy.deepcopy(model), group, placement_of(model, "replicated", 2)).ray_ep
        clock = Clock()
        groups = {"slow": Shaped(group, clock, (0.01, 1e9)), "fast": Shaped(group, clock, (0.001, 1e9))}
        choice = choose(ep, work_of(group.rank, 16, 2), 1, groups, backward=False, clock=clock)
        assert ep.group.present is groups["fast"]
        assert all(x.group is ep.group for x in (*ep.layers, *ep.replicas))
        return choice

    choices = ranks(2, one)
    assert {c.transport for c in choices} == {"fast"}
    assert {(t.kind, t.transport) for t in choices[0].timings} == {
        (kind, name) for kind in ("flat", "all_gather") for name in ("slow", "fast")
    }


def test_two_levels_on_one_node_are_flat_and_the_choice_says_so(ranks):
    model = build("qwen3_moe")

    def one(group):
        ep = ray_ep.moe.parallelize(copy.deepcopy(model), group).ray_ep
        choice = settle(ep, "two_level", {"gloo": group})
        assert ep.exchange.kind == choice.kind == "flat"
        return choice.words(), settle(ep, "all_gather", {"gloo": group}).words()

    two_level, all_gather = ranks(2, one)[0]
    assert two_level == "flat over gloo (two_level is pinned; on one node there is one level)"
    assert all_gather == "all_gather over gloo (pinned)"


def test_ways_that_cannot_win_are_not_tried(ranks):
    def one(group):
        ep = ray_ep.moe.parallelize(build("qwen3_moe"), group, node_of=np.arange(group.size)).ray_ep
        return [ways_to_try(ep, KINDS, received) for received in (1 << 20, (1 << 20) + 1)]

    assert ranks(1, one)[0] == [(["flat"], "")] * 2
    assert ranks(2, one)[0] == [(["flat", "all_gather"], ""), (["flat"], "")]


def test_the_first_way_stays_unless_another_is_clearly_faster():
    ways = [(kind, "gloo") for kind in KINDS]
    assert fastest(dict(zip(ways, [1.0, 2.0, CLEARLY + 0.01], strict=True))) == ways[0]
    assert fastest(dict(zip(ways, [1.0, CLEARLY - 0.02, CLEARLY - 0.01], strict=True))) == ways[1]
    assert fastest({ways[2]: 1.0}) == ways[2]


def test_what_is_taken_carries_the_balance_too(ranks):
    """A transport that was not taken is closed: nothing may still gather counts over it."""

    def one(group):
        ep = ray_ep.moe.parallelize(build("qwen3_moe"), group).ray_ep
        other = group.split(0)
        take(ep, "flat", other)
        holders = ep.balancer, ep.layers[0], ep.replicas[0]
        return ep.group.present is other and all(holder.group is ep.group for holder in holders)

    assert ranks(2, one) == [True, True]
