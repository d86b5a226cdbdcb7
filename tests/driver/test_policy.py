"""How many ranks a run should have: each policy on standings that hypothesis draws, and some worked out by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.config.schema import ElasticConfig
from ray_ep.driver.elastic.policy import BACK, Standing, brings, wish

POLICIES = ("fixed", "available", "throughput")


CONFIGS = {
    (policy, least): ElasticConfig(policy=policy, min_ranks=least, max_ranks=8, wait_s=60.0)
    for policy in POLICIES
    for least in (1, 2, 4)
}
few = st.integers(0, 4)
curves = st.lists(st.floats(1e-3, 1e3), min_size=12, max_size=12).map(lambda s: dict(enumerate(s, 1)))
standings = st.builds(
    Standing, staying=st.integers(0, 8), target=st.integers(1, 8), waiting=few, joining=few, ready=few,
    pinned=st.booleans(), missing_s=st.floats(0, 100), free=st.none() | st.integers(0, 20),
    step_seconds=st.just({}) | curves,
)  # fmt: skip


@given(standings, st.sampled_from(sorted(CONFIGS)), st.integers(1, 4))
def test_no_policy_wishes_for_fewer_than_the_least_or_more_than_the_most(standing, key, least):
    found = wish(CONFIGS[key], least, 8, standing)
    assert key[1] <= found.ranks <= 8
    assert found.ranks >= min(least, standing.staying)
    assert found.words


@given(standings)
def test_fixed_and_whoever_was_asked_for_a_number_never_wish_for_more_than_it(standing):
    assert wish(CONFIGS["fixed", 1], 1, 8, standing).ranks <= max(standing.target, 1)
    pinned = replace(standing, pinned=True)
    for policy in POLICIES:
        assert wish(CONFIGS[policy, 1], 1, 8, pinned) == wish(CONFIGS["fixed", 1], 1, 8, pinned)


@given(curves, st.integers(1, 8))
def test_throughput_comes_to_rest_on_any_curve_and_goes_one_way_only(curve, ranks):
    cfg, way = CONFIGS["throughput", 1], []
    for _ in range(10):
        found = wish(cfg, 1, 8, Standing(ranks, 4, step_seconds=curve)).ranks
        way.append(found - ranks)
        ranks = found
    assert set(way) <= {0, 1} or set(way) <= {0, -1}
    assert way[-1] == 0


@given(st.floats(0.01, 1.0), st.integers(2, 8), st.floats(0.05, 1.0))
def test_a_prediction_that_is_a_little_off_does_not_take_back_what_it_gave(off, ranks, efficiency):
    """With `ranks` the last one brings just enough to be asked for, as predicted before it came, and less after it."""
    brought = efficiency * (BACK + (1 - BACK) * off)
    steps = {ranks - 1: 1.0, ranks: 1 / (1 + brought / (ranks - 1))}
    cfg = ElasticConfig(policy="throughput", max_ranks=8, efficiency=efficiency)
    assert wish(cfg, 1, 8, Standing(ranks, 4, step_seconds=steps)).ranks == ranks


def test_what_a_rank_brings_is_a_share_of_what_each_of_the_others_does():
    assert brings({3: 0.4, 4: 0.3}, 4) == pytest.approx(1.0)  # as if all of the step were shared
    assert brings({3: 0.4, 4: 0.4}, 4) == 0
    assert brings({3: 0.4, 4: 0.5}, 4) < 0
    assert brings({3: 0.4}, 4) is None
    assert brings({3: 0.4, 4: 0.0}, 4) is None


def test_fixed_asks_for_what_was_lost_until_wait_s_and_keeps_who_has_room_by_then():
    cfg = CONFIGS["fixed", 1]
    lost = Standing(2, 4, waiting=2)
    assert wish(cfg, 1, 8, lost).ranks == 4
    late = replace(lost, waiting=1, joining=1, missing_s=60.0)
    found = wish(cfg, 1, 8, late)
    assert (found.ranks, found.words) == (
        3, "the run has 4 (elastic.policy=fixed), and 1 had no room within elastic.wait_s=60 s",
    )  # fmt: skip


def test_available_takes_all_room_that_is_known_and_gives_up_who_finds_none():
    cfg = CONFIGS["available", 1]
    assert wish(cfg, 1, 8, Standing(2, 4, free=3)).ranks == 5
    assert wish(cfg, 1, 8, Standing(2, 4, waiting=1)).ranks == 3
    assert wish(cfg, 1, 8, Standing(2, 4, waiting=1, joining=1, free=0)).ranks == 3
    assert wish(cfg, 1, 4, Standing(2, 4, free=9)).words.startswith("at most 4 are allowed; the cluster has room for 9")


def test_throughput_says_what_it_goes_by_and_wishes_nothing_before_it_knows():
    cfg = CONFIGS["throughput", 1]
    assert wish(cfg, 1, 8, Standing(2, 4, waiting=1)).ranks == 3
    grows = wish(cfg, 1, 8, Standing(2, 4, step_seconds={1: 0.2, 2: 0.12, 3: 0.09}))
    assert grows.ranks == 3
    assert grows.words == (
        "one rank more should bring 67% of what a rank brings (step 120 -> 90 ms), elastic.efficiency=0.5"
    )
    shrinks = wish(cfg, 1, 8, Standing(2, 4, step_seconds={1: 0.2, 2: 0.18, 3: 0.18}))
    assert shrinks.ranks == 1
    assert "brings (step 200 -> 180 ms), less than 0.7 times elastic.efficiency=0.5" in shrinks.words
    assert wish(cfg, 1, 8, Standing(2, 4, step_seconds={1: 0.2, 2: 0.14, 3: 0.14})).ranks == 2
    disappointed = wish(cfg, 1, 8, Standing(2, 4, step_seconds={1: 0.2, 2: 0.3, 3: 0.2}))
    assert disappointed.ranks == 1  # however much a third one promises


def test_after_a_loss_nobody_is_asked_for_beyond_wait_s_even_under_what_a_run_is_asked_down_to():
    """Slots grow where a loss leaves too few ranks for them; nobody would be asked down to that."""
    alone = Standing(1, 2, missing_s=60.0)
    assert wish(CONFIGS["fixed", 1], 2, 8, alone).ranks == 1
    assert wish(CONFIGS["fixed", 2], 2, 8, alone).ranks == 2
