"""A rank that is slow for its work is named, and named again when it is slow no more."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.config import load_config
from ray_ep.config.schema import BatchConfig
from ray_ep.driver.elastic.stragglers import JUDGED, Stragglers, slowness
from ray_ep.rank.step.clock import STEP_PHASES
from tests.driver.fakes import results

ROW, PAIR = 0.02, 1e-5


def step(pace, rows, pairs, wait=0.0):
    """Results of ranks that work at this pace (1: usual) on rows and pairs, and wait for others."""
    said = []
    for r, one in enumerate(results(size=len(pace))):
        phases = dict.fromkeys(STEP_PHASES, wait)
        phases |= dict.fromkeys(("data", "forward", "dispatch_forward", "dispatch_backward", "experts_forward"), 0.0)
        phases |= {"backward": pace[r] * ROW * rows[r], "experts_backward": pace[r] * PAIR * pairs[r]}
        usage = replace(one.usage, phases=np.array([phases[n] for n in STEP_PHASES]), pairs=np.array([pairs[r], 0]))
        said.append(replace(one, usage=usage))
    return said


def test_slowness_is_told_from_own_work_whatever_each_rank_has_to_do_and_waits_for():
    pace, rows, pairs = [1, 1, 4, 1], [3, 2, 3, 2], [4000, 1000, 2000, 3000]
    assert slowness(step(pace, rows, pairs, wait=9.0), rows) == pytest.approx([1, 1, 4, 1])
    assert slowness(step([1, 4], [4, 4], [100, 900]), [4, 4]) == pytest.approx([1 / 4, 4])


def test_ranks_without_rows_or_without_pairs_are_judged_by_what_they_have():
    assert slowness(step([1, 1, 1, 5], [1, 1, 1, 0], [9] * 4), [1, 1, 1, 0]) == pytest.approx([1, 1, 1, 5])
    assert slowness(step([1, 5, 1, 1], [1] * 4, [9, 0, 9, 9]), [1] * 4) == pytest.approx([1, 5, 1, 1])
    assert slowness(step([1, 5], [1, 0], [0, 100]), [1, 0]) == pytest.approx([1, 1])  # nothing to compare with


@given(
    st.lists(st.tuples(st.floats(0.5, 2.0), st.integers(1, 9), st.integers(1, 9999)), min_size=2, max_size=9), st.data()
)
def test_it_is_the_pace_over_the_median_pace_of_the_others(ranks, data):
    pace, rows, pairs = (list(x) for x in zip(*ranks, strict=True))
    slow = data.draw(st.integers(0, len(pace) - 1))
    pace[slow] = 50.0
    expected = [p / np.median(pace[:r] + pace[r + 1 :]) for r, p in enumerate(pace)]
    assert slowness(step(pace, rows, pairs), rows) == pytest.approx(expected)


BATCH = BatchConfig(sequences=9)
ROWS = [3, 3, 3]


def watch(it, paces, members=("m0", "m1", "m2")):
    """What is said while each step has the next of these paces of m1."""
    rows = [9 // len(members)] * len(members)
    pairs = [300] * len(members)
    said = [it.after_step(members, step([p if m == "m1" else 1.0 for m in members], rows, pairs)) for p in paces]
    return [(n, e.fields["member"], e.fields["slow"]) for n, events in enumerate(said, 1) for e in events]


def test_a_slow_rank_is_named_once_and_once_more_when_it_is_slow_no_more():
    it = Stragglers(BATCH)
    assert watch(it, [1.0] * 20) == []
    assert watch(it, [3.5] * 30) == [(6, "m1", True)]
    assert it.slow == ["m1"]
    assert watch(it, [2.5] * 30) == []
    assert watch(it, [1.0] * 30) == [(5, "m1", False)]
    assert it.slow == []


def test_what_is_said_names_the_rank_and_how_slow_it_is():
    it = Stragglers(BATCH)
    (event,) = [e for _ in range(JUDGED) for e in it.after_step(("a", "b", "c"), step([1, 4.2, 1], ROWS, [9, 9, 9]))]
    assert event.kind == "straggler"
    assert event.words == (
        "rank 1 (b) takes 4.2 times as long as the others for the same work, in the median of 10 steps (slow: over 3)"
    )
    assert event.fields == {"rank": 1, "member": "b", "slow": True, "times": pytest.approx(4.2)}


def test_a_slow_step_now_and_then_or_a_start_names_nobody():
    it = Stragglers(BATCH)
    assert watch(it, [40.0] * 4 + [1.0] * 10) == []
    assert watch(it, ([40.0] * 4 + [1.0] * 6) * 5) == []


def test_a_rank_that_leaves_is_forgotten_and_the_others_are_not_judged_anew():
    it = Stragglers(BATCH)
    watch(it, [4.0] * 9)
    assert watch(it, [4.0], members=("m1", "m2")) == [(1, "m1", True)]
    assert watch(it, [1.0], members=("m0", "m2")) == []
    assert it.slow == []
    assert watch(it, [1.0], members=("m0",)) == []  # alone


def test_rows_are_those_that_the_ranks_share_in_each_pass():
    it = Stragglers(load_config(None, ["batch.sequences=10", "batch.accumulation=2"]).batch)
    rows, pairs = [2, 4, 4], [1, 1, 1]  # 5 rows a pass: 1, 2, 2
    paces = [[1, 1, 2.9]] * JUDGED + [[3.2, 1, 1]] * JUDGED
    said = [event for pace in paces for event in it.after_step("abc", step(pace, rows, pairs))]
    assert [e.fields["times"] for e in said] == [pytest.approx(3.2)]
