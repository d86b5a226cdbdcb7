"""When which fault comes: the same for the same seed, at the pace that was asked for, each kind as often."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.chaos.schedule import Fault, Kind, Wish, counted, kinds_of
from ray_ep.chaos.schedule import schedule as schedule_of
from ray_ep.errors import BadInput

KINDS = st.lists(st.sampled_from(Kind), min_size=1, max_size=len(Kind), unique=True)
EVERY = st.floats(0.5, 100)


def schedule(kinds, seconds, every_s, seed):
    return schedule_of(Wish(tuple(kinds), seconds, every_s, seed, 1e-5))


@given(KINDS, EVERY, st.integers(0, 100), st.integers(0, 60))
def test_a_schedule_is_a_function_of_its_arguments_and_a_longer_one_begins_with_it(kinds, every, seed, count):
    short = schedule(kinds, count * every, every, seed)
    assert short == schedule(kinds, count * every, every, seed)
    assert schedule(kinds, (count + 7) * every, every, seed)[: len(short)] == short
    assert len(short) == count


@given(KINDS, EVERY, st.integers(0, 100))
def test_faults_keep_their_pace_and_never_come_closer_than_half_of_it(kinds, every, seed):
    faults = schedule(kinds, 40 * every, every, seed)
    times = [f.at for f in faults]
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0.5 * every * (1 - 1e-9)
    assert max(gaps) <= 1.5 * every * (1 + 1e-9)
    assert [f.number for f in faults] == list(range(40))


@given(KINDS, st.integers(0, 100))
def test_every_kind_comes_as_often_as_another(kinds, seed):
    times = Counter(f.kind for f in schedule(kinds, 3 * len(kinds), 1.0, seed))
    assert times == dict.fromkeys(kinds, 3)


def test_another_seed_gives_other_faults():
    one, two = (schedule([Kind.KILL, Kind.NODE], 100, 5.0, seed) for seed in (0, 1))
    assert [f.at for f in one] != [f.at for f in two]
    assert len({f.pick for f in one}) == len(one)


def test_a_stop_costs_ranks_only_if_it_is_a_long_one():
    assert not Fault(0, Kind.STOP, 1.0, 0.0, 0.49).deadly
    assert Fault(0, Kind.STOP, 1.0, 0.0, 0.5).deadly
    assert Fault(0, Kind.KILL, 1.0, 0.0, 0.0).deadly
    assert not Fault(0, Kind.DRAIN, 1.0, 0.0, 0.9).deadly


def test_names_become_kinds_once_each():
    assert kinds_of(" kill,node, kill", {}) == (Kind.KILL, Kind.NODE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kil", "unknown fault 'kil'; did you mean 'kill'; allowed: kill, node, stop, cut, slow, drain, add"),
        ("kill,fire", "unknown fault 'fire'; allowed: kill,"),
        (" ,", "expected one or several of kill, node"),
        ("node,cut", "cut is not possible here: no cable"),
    ],
)
def test_what_is_no_fault_here_is_refused(text, words):
    with pytest.raises(BadInput, match=words):
        kinds_of(text, {Kind.CUT: "no cable"})


def test_faults_are_counted_in_a_fixed_order():
    assert list(counted([Kind.STOP, Kind.KILL, Kind.STOP]).items()) == [("kill", 1), ("stop", 2)]
