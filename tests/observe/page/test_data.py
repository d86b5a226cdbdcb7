"""What the page asks for beside the state: placements as changes, packed pairs, the greatest flows."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from ray_ep.observe.page import data
from ray_ep.observe.page.data import History, layer, layers, packed
from ray_ep.observe.state import RunState
from ray_ep.placement import Placement
from tests.observe.page.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return RunState(folder)


def rebuilt(told, start=None):
    """Slots and owners of each version, as placements.js works them out."""
    found, slots, owners = {}, *(start or (None, None))
    for entry in told["kept"]:
        if "slots" in entry:
            slots, owners = np.array(entry["slots"]), np.array(entry["primary"])
        else:
            slots, owners = slots.copy(), owners.copy()
            slots[entry["at"]], owners[entry["owner_at"]] = entry["to"], entry["owner_to"]
        found[entry["version"]] = slots, owners
    return found


def test_every_placement_can_be_rebuilt_from_the_first_and_what_changed(run):
    told = json.loads(json.dumps(History(run).after()))
    assert (told["layers"], told["experts"]) == (4, 16)
    found = rebuilt(told)
    assert sorted(found) == run.placements.numbers == [0, 1, 2, 3]
    for version, (slots, owners) in found.items():
        placement = run.placements.read(version)
        assert np.array_equal(slots, placement.slots.reshape(-1))
        assert np.array_equal(owners, placement.owner.reshape(-1))


def test_who_has_a_placement_is_told_only_what_came_after_it(run):
    found = rebuilt(History(run).after())
    later = History(run).after(1)
    assert [entry["version"] for entry in later["kept"]] == [2, 3]
    assert "slots" not in later["kept"][0]
    assert np.array_equal(rebuilt(later, found[1])[3][0], found[3][0])
    assert History(run).after(3)["kept"] == []


def test_a_placement_of_other_ranks_is_told_whole(tmp_path):
    slots = np.arange(8).reshape(1, 2, 4)
    for version, ranks in ((0, slots), (1, slots.reshape(1, 4, 2))):
        (tmp_path / "placements").mkdir(exist_ok=True)
        (tmp_path / "placements" / f"{version:04d}.json").write_text(Placement(ranks, 8, version).to_json())
    told = History(RunState(tmp_path)).after()["kept"]
    assert [("slots" in entry, entry.get("ranks")) for entry in told] == [(True, 2), (True, 4)]


def test_of_very_many_changes_the_newest_are_told_and_the_first_of_them_is_whole(run, monkeypatch):
    whole = len(History(run).after()["kept"][0]["slots"])
    monkeypatch.setattr(data, "MOST_NUMBERS", whole)
    told = History(run).after()
    assert 0 < len(told["kept"]) < 4
    assert "slots" in told["kept"][0]
    assert np.array_equal(rebuilt(told)[3][0], run.placements.read(3).slots.reshape(-1))


def test_a_placement_that_comes_is_told_and_those_before_are_not_read_again(tmp_path, monkeypatch):
    last = write_run(tmp_path)[-1]
    state = RunState(tmp_path)
    history = History(state)
    assert len(history.after()["kept"]) == 4
    (tmp_path / "placements" / "0004.json").write_text(replace(last, version=4).to_json())
    told = {
        "step": 240,
        "kind": "placement",
        "message": "again",
        "fields": {"placement_version": 4, "cause": "rebalance"},
    }
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    assert state.refresh()
    read, numbers = state.placements.read, []
    monkeypatch.setattr(state.placements, "read", lambda number: numbers.append(number) or read(number))
    assert [(entry["version"], entry["at"]) for entry in history.after(3)["kept"]] == [(4, [])]
    assert numbers == [4]
    assert [entry["version"] for entry in history.after(77)["kept"]] == [0, 1, 2, 3, 4]  # of a run that is another


def test_a_damaged_placement_is_left_out(tmp_path):
    write_run(tmp_path)
    (tmp_path / "placements" / "0001.json").write_text("{")
    state = RunState(tmp_path)
    found = rebuilt(History(state).after())
    assert sorted(found) == [0, 2, 3]
    assert np.array_equal(found[2][0], state.placements.read(2).slots.reshape(-1))


def test_a_directory_without_anything_has_no_placement_and_no_layer(tmp_path):
    state = RunState(tmp_path)
    assert History(state).after() == {"layers": 0, "experts": 0, "kept": []}
    assert layer(state, 0) is None
    assert layers(state) == {}


def test_packed_ratios_keep_their_order_within_two_percent_and_hold_at_the_ends():
    ratios = np.full((4, 4), np.nan)
    upper = [1.0, 2.0, 0.5, 100.0, 1e-9, np.nan]
    ratios[np.triu_indices(4, 1)] = upper
    codes = np.frombuffer(base64.b64decode(packed(ratios)), np.uint8).astype(float)
    assert codes[5] == 0
    back = 2.0 ** ((codes[:5] - 1) / 254 * 6 - 3)
    assert back == pytest.approx([1.0, 2.0, 0.5, 8.0, 0.125], rel=0.02)


def test_a_layer_tells_its_greatest_flows_and_their_sum(run):
    told, flows = layer(run, 1), run.pairs("transitions", 1)
    assert told["all"] == flows.sum()
    assert told["flows"][0][2] == flows.max()
    assert all(flows[a, b] == n for a, b, n in told["flows"])
    assert "flows" not in layer(run, 3)  # the last has no next one


def test_of_a_wide_model_pairs_of_the_first_layers_are_held_in_a_file(run, monkeypatch):
    assert all("ratios" in told for told in layers(run).values())
    monkeypatch.setattr(data, "PAIR_BYTES", 2 * 16 * 15 * 2 / 3)
    assert [number for number, told in layers(run).items() if "ratios" in told] == ["0", "1"]
