"""Priorities of node types that a cloud refuses, and the file in which Ray's autoscaler finds them."""

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster_files.shell import script

FALLBACK = script("fallback")
NAMES = ["spot", "demand", "driver"]


def types(**priorities):
    return {name: {"priority": p, "resources": {}} if p is not None else {} for name, p in priorities.items()}


def test_a_refused_type_comes_last_until_it_has_cooled():
    own = types(spot=10, demand=0, driver=None)
    refused = {"spot": 100.0}
    assert FALLBACK.priorities(own, refused, 101.0, 60.0) == {"spot": 10 - FALLBACK.LOWERED, "demand": 0, "driver": 0}
    assert FALLBACK.priorities(own, refused, 160.0, 60.0) == {"spot": 10, "demand": 0, "driver": 0}


@given(
    own=st.dictionaries(st.sampled_from(NAMES), st.integers(-1000, 1000), min_size=1),
    refused=st.dictionaries(st.sampled_from(NAMES), st.floats(0, 100)),
    times=st.lists(st.floats(0, 1000), min_size=1, max_size=5),
)
def test_what_was_lowered_before_changes_nothing(own, refused, times):
    """Asked at several times, each with the priorities of before, it answers as if asked at the last time alone."""
    now = types(**own)
    for time in times:
        now = types(**FALLBACK.priorities(now, refused, time, 60.0))
    assert {n: t["priority"] for n, t in now.items()} == FALLBACK.priorities(types(**own), refused, times[-1], 60.0)


@given(refused=st.dictionaries(st.sampled_from(NAMES), st.just(5.0)))
def test_those_that_are_refused_keep_their_order_behind_all_others(refused):
    own = {"spot": 10, "demand": 0, "driver": -10}
    found = FALLBACK.priorities(types(**own), refused, 6.0, 60.0)
    assert sorted(found, key=found.get, reverse=True) == sorted(own, key=lambda n: (n in refused, -own[n]))


def test_the_file_is_replaced_in_one_piece_and_left_alone_where_nothing_changes(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("# mine\navailable_node_types:\n  spot: {priority: 10}\n  demand: {}\nmax_workers: 3\n")
    reader = file.open()
    assert FALLBACK.update(file, {}, 0.0, 60.0) == {}
    assert file.read_text().startswith("# mine")
    assert FALLBACK.update(file, {"spot": 0.0}, 1.0, 60.0) == {"spot": 10 - FALLBACK.LOWERED}
    assert (
        yaml.safe_load(reader)["available_node_types"]["spot"]["priority"] == 10
    )  # who reads it has the whole old one
    tree = json.loads(file.read_text())
    assert (tree["max_workers"], tree["available_node_types"]["spot"]["priority"]) == (3, 10 - FALLBACK.LOWERED)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
