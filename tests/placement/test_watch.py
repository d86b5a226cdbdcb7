"""A link that degrades is noticed from what the job sends, and named."""

import numpy as np
import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement.links.watch import LinkWatch
from ray_ep.placement.topology import Topology

NODE_OF = np.array([0, 0, 1, 1])
INSIDE = NODE_OF[:, None] == NODE_OF[None]
RANKS = len(NODE_OF)


def topology():
    return Topology(np.where(INSIDE, 3e9, 1e8), np.full((RANKS, RANKS), 1e-4), NODE_OF)


def exchange(true, rng, serial=True, wait=0.0):
    """Bytes [R, R] of an uneven exchange and seconds [R]: a rank's links in turn, or all at once."""
    size = np.floor(1e6 * rng.lognormal(0, 0.5, (RANKS, RANKS)))
    np.fill_diagonal(size, 0)
    time = np.where(size > 0, true.latency + size / true.bandwidth, 0)
    add = (lambda t, axis: t.sum(axis)) if serial else (lambda t, axis: t.max(axis))
    seconds = np.maximum(add(time, 0), add(time, 1)) * rng.uniform(1.0, 1.2, RANKS) + wait
    return size, seconds


def slowed(true, source, destination, factor):
    true.bandwidth[source, destination] /= factor


def test_one_link_of_which_each_message_is_slow_is_named_and_then_taken_for_what_it_is():
    watch = LinkWatch(topology(), observations=4)
    for _ in range(20):
        assert watch.observe(0, 2, 1e6, 1.3e-2) is None
    found = [watch.observe(0, 2, 1e6, 6.1e-2) for _ in range(10)]
    change = next(c for c in found if c)
    assert found.index(change) == 3
    assert [c for c in found if c] == [change]
    assert (change.source, change.destination, change.sure) == (0, 2, True)
    assert change.factor == pytest.approx(6, rel=0.05)
    assert change.words == (
        "link from rank 0 to rank 2 (between nodes) is 6.0 times slower than the topology says: 17 MB/s instead of "
        "100 MB/s, over 4 observations"
    )
    assert watch.topology.bandwidth[0, 2] == pytest.approx(1e8 / 6, rel=0.05)
    assert watch.topology.bandwidth[2, 0] == 1e8
    back = [c for c in (watch.observe(0, 2, 1e6, 1.01e-2) for _ in range(4)) if c]
    assert len(back) == 1
    assert "times faster" in back[0].words
    assert watch.topology.bandwidth[0, 2] == pytest.approx(1e8, rel=0.1)


def test_a_single_slow_message_is_nothing():
    watch = LinkWatch(topology(), observations=3)
    for i in range(30):
        assert watch.observe(0, 2, 1e6, 0.5 if i % 3 == 0 else 1e-2) is None


def test_small_messages_and_links_that_were_never_measured_are_nothing():
    watch = LinkWatch(topology(), observations=1)
    assert watch.observe(0, 2, 100, 5.0) is None
    assert LinkWatch(Topology.of_nodes([0, 1]), observations=1).observe(0, 1, 1e6, 5.0) is None
    blind = LinkWatch(Topology.of_nodes([0, 1]), observations=1)
    assert blind.observe_exchange(np.full((2, 2), 1e6), [5.0, 5.0]) == []


@pytest.mark.parametrize("serial", [True, False])
@pytest.mark.parametrize("link", [(0, 2), (3, 1), (2, 3)])
def test_a_slow_link_is_named_from_whole_exchanges_within_twenty(link, serial):
    right = 0
    for seed in range(10):
        rng, true, watch = np.random.default_rng(seed), topology(), LinkWatch(topology(), observations=8)
        for _ in range(30):
            assert watch.observe_exchange(*exchange(true, rng, serial)) == []
        slowed(true, *link, 400 if link == (2, 3) else 15)
        each = (watch.observe_exchange(*exchange(true, rng, serial)) for _ in range(12))
        changes = next((c for c in each if c), [])
        assert changes, f"seed {seed}: not noticed"
        assert set(link) & {changes[0].source, changes[0].destination}
        right += (changes[0].source, changes[0].destination) == link
    assert right >= 9


def test_of_a_link_that_slowed_one_exchange_that_was_quick_does_not_begin_the_count_anew():
    rng, watch, true = np.random.default_rng(1), LinkWatch(topology()), topology()
    for _ in range(10):
        watch.observe_exchange(*exchange(true, rng))
    slower = (3.0, 2.2, 1.6, 2.6, 2.4)
    found = []
    for factor in slower:
        size, seconds = exchange(true, rng)
        found.append(watch.observe_exchange(size, factor * seconds))
    assert found[-1]
    assert not any(found[:-1])


def test_exchanges_that_are_all_well_say_nothing_for_long():
    rng, watch = np.random.default_rng(1), LinkWatch(topology())
    assert not any(watch.observe_exchange(*exchange(topology(), rng)) for _ in range(500))


def test_when_all_ranks_wait_nothing_is_said_with_certainty():
    rng, watch = np.random.default_rng(1), LinkWatch(topology())
    for _ in range(10):
        watch.observe_exchange(*exchange(topology(), rng))
    changes = [c for _ in range(10) for c in watch.observe_exchange(*exchange(topology(), rng, wait=1.0))]
    assert changes
    assert not any(c.sure for c in changes)
    assert "measure again" in changes[0].words


def test_one_time_for_all_ranks_watches_the_rank_with_most_to_do():
    rng, true, watch = np.random.default_rng(3), topology(), LinkWatch(topology(), observations=4)
    found = []
    for step in range(80):
        if step == 40:
            slowed(true, 0, 2, 20)
        size, seconds = exchange(true, rng)
        found += watch.observe_exchange(size, float(seconds.max()))
        assert step > 40 or not found
    assert found


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w: w.observe(0, 0, 1e6, 1.0), "expected two"),
        (lambda w: w.observe(0, 9, 1e6, 1.0), "rank 0 to 9"),
        (lambda w: w.observe(0, 1, 1e6, float("nan")), "finite"),
        (lambda w: w.observe(0, 1, -1e6, 1.0), "-1000000"),
        (lambda w: w.observe(0, 1, 1e6, 0.0), "0.0 s"),
        (lambda w: w.observe_exchange(np.ones((2, 2)), 1.0), "do not fit 4 ranks"),
        (lambda w: w.observe_exchange(np.ones((4, 4)), np.ones(3)), "do not fit 4 ranks"),
        (lambda w: w.observe_exchange(np.full((4, 4), np.nan), 1.0), "finite"),
        (lambda w: w.observe_exchange(np.ones((4, 4)), -1.0), "not negative"),
        (lambda w: LinkWatch(w.topology, factor=1.0), "above 1"),
        (lambda w: LinkWatch(w.topology, observations=0), "0 observations"),
    ],
)
def test_bad_observations_are_named(call, says):
    with pytest.raises(PlacementError, match=says):
        call(LinkWatch(topology()))
