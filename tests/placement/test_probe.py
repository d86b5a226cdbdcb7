"""The pure half of probing: schedule, fit, assembly, groups, contradictions, and the whole on imagined links."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.errors import PlacementError
from ray_ep.placement.links.groups import contradictions, find_groups, in_words
from ray_ep.placement.links.probe import LinkFit, assemble, fit, probe_rounds, round_budget, time_link, tournament
from ray_ep.placement.topology import Topology


def blocks(nodes, per_node):
    return np.repeat(np.arange(nodes), per_node)


# --- which pairs when


def test_tournament_of_four_by_hand():
    assert tournament(4) == [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    assert tournament(1) == tournament(0) == []
    assert tournament(2) == [[(0, 1)]]


@given(st.integers(0, 40))
def test_in_a_tournament_each_meets_each_once_and_nobody_twice_in_a_round(players):
    games = tournament(players)
    assert sorted(itertools.chain(*games)) == list(itertools.combinations(range(players), 2))
    for game in games:
        assert len({x for pair in game for x in pair}) == 2 * len(game)
    assert len(games) == (0 if players < 2 else players - 1 + players % 2)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.sampled_from([None, 1, 2, 1000]), st.integers(0, 3))
def test_rounds_are_disjoint_and_cover_all_pairs_inside_and_all_pairs_of_nodes(node_of, samples, seed):
    plan = probe_rounds(node_of, samples, seed)
    assert plan == probe_rounds(node_of, samples, seed)
    for pairs in plan:
        ranks = [r for pair in pairs for r in pair]
        assert len(set(ranks)) == len(ranks)
        across = [n for a, b in pairs if node_of[a] != node_of[b] for n in (node_of[a], node_of[b])]
        assert len(set(across)) == len(across)
        assert not (across and len(across) < 2 * len(pairs)), "inside and across do not share a round"
    all_pairs = list(itertools.chain(*plan))
    assert len(set(all_pairs)) == len(all_pairs)
    inside = {p for p in itertools.combinations(range(len(node_of)), 2) if node_of[p[0]] == node_of[p[1]]}
    assert {p for p in all_pairs if node_of[p[0]] == node_of[p[1]]} == inside
    sizes = Counter(node_of)
    met = Counter(tuple(sorted((node_of[a], node_of[b]))) for a, b in all_pairs if node_of[a] != node_of[b])
    for a, b in itertools.combinations(sorted(sizes), 2):
        most = sizes[a] * sizes[b]
        assert 1 <= met[a, b] <= most
        if samples:
            assert met[a, b] == min(samples, most)


def test_samples_take_turns_among_the_ranks_of_a_node():
    across = list(itertools.chain(*probe_rounds(blocks(4, 8), samples=8)[7:]))
    for a, b in itertools.combinations(range(4), 2):
        pairs = [p for p in across if (p[0] // 8, p[1] // 8) == (a, b)]
        assert sorted(x for x, _ in pairs) == list(range(8 * a, 8 * a + 8))
        assert sorted(y for _, y in pairs) == list(range(8 * b, 8 * b + 8))


def test_few_nodes_are_measured_whole():
    assert len(list(itertools.chain(*probe_rounds(blocks(2, 2))))) == 6
    assert len(list(itertools.chain(*probe_rounds(range(4))))) == 6


@pytest.mark.parametrize("node_of", [[], [[0, 1]], [0.5, 1.0]])
def test_node_of_that_is_none_is_refused(node_of):
    with pytest.raises(PlacementError, match="expected one integer a rank"):
        probe_rounds(np.asarray(node_of))
    with pytest.raises(PlacementError, match="at least 1"):
        probe_rounds([0, 1], samples=0)


# --- one link


def link(latency, bandwidth, noise=0.0, rng=None):
    """A ping over an imagined link; disturbances only add time, one message in twenty is eleven times as slow."""

    def ping(size, repeats):
        exact = 2 * latency + size / bandwidth
        if not noise:
            return [exact] * repeats
        late = rng.exponential(noise, repeats) + np.where(rng.random(repeats) < 0.05, 10.0, 0.0)
        return list(exact * (1 + late))

    return ping


def test_fit_by_hand():
    f = fit({1: [2e-3] * 3, 1000: [3e-3, 3e-3, 3e-3]})
    assert f.latency == pytest.approx(1e-3, rel=2e-3)
    assert f.bandwidth == pytest.approx(999 / 1e-3)
    assert f.spread == 0
    assert fit({1: [1.0] * 3, 10: [1.0, 2.0, 3.0]}).spread == pytest.approx(0.25)


@settings(deadline=None, max_examples=60, derandomize=True)  # enough disturbed messages fool anybody: rarely red
@given(st.floats(1e-6, 2e-2), st.floats(2e6, 5e10), st.sampled_from([0.0, 0.02, 0.05]), st.integers(0, 10**6))
def test_fit_recovers_latency_and_bandwidth_under_noise(latency, bandwidth, noise, seed):
    f = fit(time_link(link(latency, bandwidth, noise, np.random.default_rng(seed)), 0.2))
    # What can be known: the time of a large message; latency and bandwidth apart only where each is a part of it.
    for size in (1 << 16, 1 << 20):
        said, true = f.latency + size / f.bandwidth, latency + size / bandwidth
        assert said == pytest.approx(true, rel=0.25 if noise else 0.01)
    assert f.latency == pytest.approx(latency, rel=0.25 if noise else 0.01)
    if (1 << 20) / bandwidth > latency or not noise:
        assert f.bandwidth == pytest.approx(bandwidth, rel=0.25 if noise else 0.05)
    assert 0 <= f.spread < 12


def test_a_burst_that_a_shaper_lets_pass_does_not_count_as_bandwidth():
    bucket = [200_000.0]

    def ping(size, repeats):
        seconds = []
        for _ in range(repeats):
            fast = min(size, bucket[0])
            bucket[0] -= fast
            seconds.append(1e-4 + fast / 1e9 + (size - fast) / 1e7)
        return seconds

    assert fit(time_link(ping, 0.5)).bandwidth == pytest.approx(1e7, rel=0.1)


def test_a_link_too_slow_for_its_time_is_still_timed_until_the_size_makes_a_difference():
    sent = []

    def slow(size, repeats):
        sent.append((size, repeats))
        return link(0.05, 1e4)(size, repeats)

    assert fit(time_link(slow, 0.01)).bandwidth == pytest.approx(1e4, rel=0.01)
    assert sent == [(1, 5), (1, 5), (1 << 14, 5)]


def test_a_disturbed_size_is_timed_again_in_what_is_left_of_the_time():
    calls = []

    def ping(size, repeats):
        calls.append(size)
        exact = link(1e-5, 1e9)(size, repeats)
        first = size == 1 << 22 and calls.count(size) == 1
        return [t * (1 + i) for i, t in enumerate(exact)] if first else exact

    found = time_link(ping, 1.0)
    assert calls.count(1 << 22) == 2
    assert calls.count(1 << 20) == 1
    assert len(found[1 << 22]) == 18
    assert fit(found).bandwidth == pytest.approx(1e9, rel=0.01)


def test_a_far_but_fast_link_gets_messages_large_enough_to_see_its_bandwidth():
    f = fit(time_link(link(0.05, 4e7), 0.01))
    assert f.bandwidth == pytest.approx(4e7, rel=0.01)


def test_a_link_on_which_size_makes_no_difference_is_at_least_so_fast():
    f = fit({1: [1e-3] * 3, 1000: [1e-3] * 3})
    assert f.bandwidth == pytest.approx(1e9)
    f = fit({1: [1e-3] * 3, 1000: [0.9e-3, 1e-3, 1.1e-3]})
    assert f.bandwidth == pytest.approx(1e7)
    assert f.latency == pytest.approx(0.5e-3, rel=1e-3)


@pytest.mark.parametrize(
    "timings",
    [{}, {1: [1.0]}, {1: [1.0], 2: []}, {1: [1.0], 2: [float("nan")]}, {1: [-1.0], 2: [1.0]}, {1: [0.0], 2: [1.0]}],
)
def test_times_that_are_none_are_refused(timings):
    with pytest.raises(PlacementError, match="expected"):
        fit(timings)


def test_the_budget_is_shared_by_the_rounds_that_are_left():
    assert round_budget(1.0, 0.0, 10) == pytest.approx(0.1)
    assert round_budget(1.0, 0.9, 2) == pytest.approx(0.05)
    assert round_budget(100.0, 0.0, 2) == pytest.approx(1.0)
    assert round_budget(1.0, 5.0, 3) == 0


# --- all links


def test_a_pair_that_was_not_measured_has_the_median_of_its_pair_of_nodes():
    fits = {(a, b): LinkFit(1e-6, 1e9, 0.1) for a, b in [(0, 1), (1, 0), (2, 3), (3, 2)]}
    fits |= {(0, 2): LinkFit(1e-4, 1e7, 0.2), (1, 3): LinkFit(3e-4, 3e7, 0.2), (2, 0): LinkFit(5e-4, 5e7, 0.3)}
    t = assemble([0, 0, 1, 1], fits, measured_at=5.0)
    assert t.bandwidth[0, 3] == t.bandwidth[1, 2] == 2e7
    assert t.latency[0, 3] == pytest.approx(2e-4)
    assert t.bandwidth[2, 0] == 5e7
    assert t.bandwidth[3, 1] == 3e7, "the other direction of the same link comes before the median"
    assert t.bandwidth[2, 1] == 4e7
    assert t.measured.sum() == 7
    assert not t.measured[0, 3]
    assert t.measured_at == 5.0
    assert np.isinf(np.diag(t.bandwidth)).all()
    u = Topology.from_json(t.to_json())
    for name in ("bandwidth", "latency", "node_of", "spread", "measured"):
        assert np.array_equal(getattr(t, name), getattr(u, name))
    assert u.groups is None
    assert u.measured_at == 5.0


@pytest.mark.parametrize(
    ("fits", "says"),
    [
        ({(0, 1): LinkFit(float("nan"), 1.0, 0.0)}, "rank 0 to rank 1"),
        ({(0, 1): LinkFit(-1e-6, 1.0, 0.0)}, "not negative"),
        ({(1, 0): LinkFit(0.0, -3.0, 0.0)}, "rank 1 to rank 0.*-3"),
        ({(0, 1): LinkFit(0.0, float("nan"), 0.0)}, "nan"),
        ({(0, 1): LinkFit(0.0, float("inf"), 0.0)}, "inf"),
        ({(0, 1): LinkFit(0.0, 1.0, -1.0)}, "spread"),
        ({(0, 5): LinkFit(0.0, 1.0, 0.0)}, "rank 5"),
        ({(1, 1): LinkFit(0.0, 1.0, 0.0)}, "expected two"),
        ({}, r"no link from ranks \[0\] to ranks \[1\]"),
    ],
)
def test_a_measurement_that_is_none_is_named(fits, says):
    with pytest.raises(PlacementError, match=says):
        assemble([0, 1], fits)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"spread": np.full((2, 2), -1.0)}, "spread"),
        ({"spread": np.zeros((3, 3))}, "spread"),
        ({"groups": [0]}, "groups"),
        ({"measured": np.ones(2, bool)}, "measured"),
        ({"measured_at": float("nan")}, "measured_at"),
    ],
)
def test_a_topology_checks_what_was_measured(more, says):
    with pytest.raises(PlacementError, match=says):
        Topology(np.ones((2, 2)), np.zeros((2, 2)), [0, 1], **more)
    with pytest.raises(PlacementError, match="latency"):
        Topology(np.ones((2, 2)), np.full((2, 2), np.inf), [0, 1])


# --- groups and contradictions


def topology(node_of, inside=3.1e9, across=1.1e8, said=None, odd=None, latency=1e-5):
    """Links by the true node of each rank; `odd` gives pairs their own bandwidth."""
    node_of = np.asarray(node_of)
    bandwidth = np.where(node_of[:, None] == node_of[None], inside, across).astype(float)
    for (a, b), value in (odd or {}).items():
        bandwidth[a, b] = bandwidth[b, a] = value
    return Topology(bandwidth, np.full(bandwidth.shape, latency), node_of if said is None else said)


@given(st.permutations([0, 0, 0, 1, 1, 2, 2, 2, 3]), st.integers(0, 99))
def test_groups_are_found_whatever_is_said_and_under_noise(true, seed):
    clean = topology(true, said=np.zeros(9, int))
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.1, (9, 9)))
    t = find_groups(Topology(clean.bandwidth * noise, clean.latency, clean.node_of))
    assert all((t.groups[a] == t.groups[b]) == (true[a] == true[b]) for a in range(9) for b in range(9))
    assert t.groups[0] == 0


def test_links_that_are_all_alike_make_one_group_unless_no_two_ranks_share_a_node():
    assert find_groups(topology([0, 0, 1, 1], across=3e9)).groups.tolist() == [0, 0, 0, 0]
    assert find_groups(topology([7, 3, 5])).groups.tolist() == [0, 1, 2]
    assert find_groups(topology([0])).groups.tolist() == [0]


def test_what_agrees_with_what_is_said_gives_no_word():
    assert contradictions(topology(blocks(3, 4))) == []
    assert contradictions(topology([0, 1, 2], across=1e7)) == []
    assert contradictions(topology([0, 0])) == []


def test_a_slow_pair_that_is_said_to_share_a_node_is_worded():
    t = topology(blocks(2, 4), odd={(2, 3): 12e6})
    assert contradictions(t) == [
        "ranks 2 and 3 are said to share node 0 but their link has 12 MB/s where the node's others have 3.1 GB/s"
    ]
    lone = topology([0, 0, 1, 1], odd={(2, 3): 12e6})
    assert contradictions(lone) == [
        "ranks 2 and 3 are said to share node 1 but their link has 12 MB/s where other nodes' ranks have 3.1 GB/s"
    ]
    only = topology([0, 0, 1], odd={(0, 1): 12e6})
    assert "their links to other nodes have 110 MB/s" in contradictions(only)[0]


def test_a_rank_that_is_elsewhere_is_worded_once():
    said = blocks(2, 4)
    t = topology([0, 0, 0, 1, 1, 1, 1, 1], said=said)
    words = contradictions(t)
    assert words == [
        "rank 3 is said to share node 0 with ranks 0, 1 and 2 but its best link there has 110 MB/s where the node's "
        "others have 3.1 GB/s"
    ]
    assert find_groups(t).groups.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_slow_latency_is_a_contradiction_too_and_says_so():
    t = topology(blocks(2, 3))
    t.latency[0, 1] = t.latency[1, 0] = 0.04
    assert contradictions(t) == [
        "ranks 0 and 1 are said to share node 0 but their link has 3.1 GB/s after 40 ms where the node's others have "
        "3.1 GB/s"
    ]


def test_nodes_that_are_one_are_worded():
    assert contradictions(topology([0, 0, 1, 1], across=3e9)) == [
        "nodes 0 and 1 are said to be apart but the link between them, 3 GB/s, is as fast as those inside nodes, "
        "3.1 GB/s"
    ]
    assert contradictions(topology(blocks(3, 2), across=3e9)) == [
        "3 nodes are said to be apart but their links, 3 GB/s, are as fast as those inside them, 3.1 GB/s"
    ]


def test_a_link_that_is_not_of_the_kind_that_is_said_is_worded():
    kinds = {(0, 1): "NVLink", (0, 2): "NVLink", (1, 2): "NVLink", (2, 3): "PCIe"}
    t = topology([0] * 4, inside=2e11, latency=1e-6, odd={(1, 2): 1e10, (0, 3): 1e10, (1, 3): 1e10, (2, 3): 1e10})
    assert contradictions(t, kinds)[-1] == (
        "ranks 1 and 2 are said to be joined by NVLink but their link has 10 GB/s where others of that kind have "
        "200 GB/s"
    )


def test_bandwidth_in_words():
    assert [in_words(b) for b in (3.14e9, 450e9, 12e6, 12e3, 7.0)] == [
        "3.1 GB/s", "450 GB/s", "12 MB/s", "12 kB/s", "7 B/s",
    ]  # fmt: skip


# --- the whole, on imagined links


def simulate(nodes, per_node, budget_s, across=(2e-5, 3e9), slow=None):
    """Probe a cluster that does not exist: (topology, seconds it would take). A barrier costs 50 us a doubling."""
    node_of = blocks(nodes, per_node)
    barrier = 50e-6 * np.ceil(np.log2(len(node_of)))
    plan, clock, fits = probe_rounds(node_of), 0.0, {}
    for number, pairs in enumerate(plan):
        budget = round_budget(budget_s, clock, len(plan) - number) / 2
        longest = 0.0
        for pair in pairs:
            spent = []
            for a, b in (pair, pair[::-1]):
                latency, bandwidth = (5e-6, 2e10) if node_of[a] == node_of[b] else across
                ping = link(latency, (slow or {}).get((a, b), bandwidth))

                def timed(size, repeats, ping=ping, spent=spent):
                    seconds = ping(size, repeats)
                    spent.append(sum(seconds))
                    return seconds

                fits[a, b] = fit(time_link(timed, budget))
            longest = max(longest, sum(spent))
        clock += barrier + longest
    return assemble(node_of, fits), clock


@pytest.mark.parametrize("across", [(2e-5, 3e9), (1e-4, 1e8), (1e-3, 1e7)])
def test_sixty_four_ranks_on_eight_nodes_are_probed_in_less_than_thirty_seconds(across):
    t, seconds = simulate(8, 8, budget_s=20.0, across=across)
    assert seconds < 30
    assert t.bandwidth[0, 1] == pytest.approx(2e10, rel=0.02)
    away = t.bandwidth[t.node_of[:, None] != t.node_of[None]]
    assert away == pytest.approx(np.full_like(away, across[1]), rel=0.02)
    assert find_groups(t).groups.tolist() == t.node_of.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("across", [(2e-5, 3e9), (1e-3, 1e7)])
def test_the_time_grows_at_most_linearly_with_nodes_up_to_1024_ranks(across):
    nodes = (8, 16, 32, 64, 128)
    seconds = [simulate(n, 8, budget_s=1e9, across=across)[1] for n in nodes]
    for n, s in zip(nodes, seconds, strict=True):
        assert s <= seconds[0] * n / 8
    assert len(probe_rounds(blocks(128, 8))) == 7 + 127


def test_a_thousand_ranks_over_slow_links_keep_to_the_budget():
    assert simulate(128, 8, budget_s=20.0, across=(1e-3, 1e7))[1] < 30


def test_one_slow_link_is_found_among_many():
    t, _ = simulate(4, 2, budget_s=20.0, slow={(2, 3): 5e6, (3, 2): 5e6, (0, 4): 1e7})
    assert t.bandwidth[2, 3] == pytest.approx(5e6, rel=0.02)
    assert t.bandwidth[0, 4] == pytest.approx(1e7, rel=0.02)
    assert t.bandwidth[4, 0] == pytest.approx(3e9, rel=0.02)
    words = contradictions(t)
    assert len(words) == 1
    assert words[0].startswith("ranks 2 and 3 are said to share node 1 but their link has 5 MB/s")
