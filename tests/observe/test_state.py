"""The state of a run: read while it grows, afterwards, from cut and damaged files; what it says of places and why."""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.collective import Membership
from ray_ep.config import load_config
from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.driver.run.standing import Cause, members_event, placement_event, state_event
from ray_ep.driver.states import State
from ray_ep.errors import BadInput
from ray_ep.observe.state import PARTS, RunState
from ray_ep.observe.state.case import case_of
from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous
from tests.records import record

LAYERS, EXPERTS = 2, 8
WHERE = [{"node": f"id-{n}", "host": f"host-{n}", "address": f"10.0.0.{n}", "pid": 100 + n} for n in range(3)]
THREE = Membership(0, ("rank-0", "rank-1", "rank-2"), (0, 1, 1))
TWO = THREE.next(["rank-1"])
GROWS = ("metrics.jsonl", "events.jsonl")


def swapped(placement, layer, one, other, version):
    """With two experts of a layer in each other's place."""
    slots = placement.slots.copy()
    here, there = slots[layer] == one, slots[layer] == other
    slots[layer][here], slots[layer][there] = other, one
    return Placement(slots, placement.num_experts, version)


SETS = np.array([[[0, 1], [0, 2]], [[3, 4], [4, 5]]], np.int32)  # of two tokens in each of two layers


def step(number, ranks, version):
    load = np.full((LAYERS, EXPERTS), 10.0) + number
    figures = {"phase_seconds": {"forward": 0.02, "driver": 0.01}, "max_expert_load": [1.5, 1.0], "epoch": 3 - ranks}
    return record(
        number, load=load, placement_version=version, world_size=ranks, loss=4.0 - 0.1 * number,
        rank_load=np.ones((LAYERS, ranks)), sent=np.full((ranks, ranks), 1000.0), sample=SETS, **figures,
    )  # fmt: skip


def story(path):
    """A run of seven steps as the driver writes it: a move after step 2, a rank lost in step 5. Yields now and then."""
    run = RunDir(path)
    run.create(load_config(None, [f"run_dir={path}", "cluster.ranks=3", "optim.steps=7", "model.path=s3://me:pw@b/m"]))
    yield run
    first = contiguous(LAYERS, EXPERTS, 3)
    run.exchange({"kind": "flat", "transport": "gloo", "words": "flat over gloo", "timings": []})
    run.topology(Topology.of_nodes([0, 1, 1]))
    run.placement(first)
    run.event(state_event(State.FORMING, State.STEPPING, "3 ranks are formed, 0 steps are done"))
    run.event(members_event(THREE, WHERE, "cpu"))
    run.event(placement_event(first, Cause.START, "the run began with it"))
    run.start(Event("start", "a model", {"model": "qwen3_moe", "layers": LAYERS, "experts": EXPERTS}))
    for number in (1, 2):
        run.step(step(number, 3, 0))
        yield run
    figures = {"moves": True, "placement_version": 1, "gain_predicted": 0.01, "move_predicted": 0.5}
    run.event(Event("rebalance", "move 2 experts (asked after step 1)", figures, 2))
    second = swapped(first, 1, 0, 7, 1)
    run.placement(second)
    yield run  # the file is there, and the run has not told of it
    run.event(replace(placement_event(second, Cause.REBALANCE, "move 2 experts: pays back in 9 steps"), step=2))
    for number in (3, 4):
        run.step(step(number, 3, 1))
        yield run
    run.event(Event("rebalance", "measured", {"moved_after": 2, "gain_measured": 0.02, "move_seconds": 0.4}, 4))
    run.event(replace(state_event(State.STEPPING, State.RECOVERING, "rank 1 died"), step=4))
    yield run
    third = replace(second.among(TWO.origin(THREE), {1: 1}), version=2)  # rank-2 has what rank-1 owned
    run.topology(Topology.of_nodes([0, 1]))
    run.placement(third)
    run.event(replace(state_event(State.RECOVERING, State.STEPPING, "2 ranks are formed"), step=4))
    run.event(replace(members_event(TWO, [WHERE[0], WHERE[2]], "cpu"), step=4))
    run.event(replace(placement_event(third, Cause.LOSS, "rank 1 died"), step=4))
    for number in (4, 5, 6, 7):
        run.step(step(number, 2, 2))
    counts = {
        "desired": 3,
        "active": 2,
        "waiting": 1,
        "joining": 0,
        "ready": 0,
        "allocated": 2,
        "reason": "one is lost",
    }
    run.event(Event("elastic", "asks for 1 more", counts, 5))
    run.event(Event("straggler", "rank 1 is slow", {"rank": 1, "member": "rank-2", "slow": True}, 6))
    yield run
    counted = np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
    pairs, onward = np.ones((LAYERS, EXPERTS, EXPERTS)), np.ones((LAYERS - 1, EXPERTS, EXPERTS))
    run.statistics(RoutingStatistics(counted, pairs, onward))
    run.event(Event("checkpoint", "s3://me:pw@bucket/step-000007", {"url": "s3://me:pw@bucket/step-000007"}, 7))
    run.event(replace(state_event(State.STEPPING, State.STOPPED, "done"), step=7))
    yield run


def told(state, *parts):
    """A snapshot without the count of changes."""
    tree = state.snapshot(*parts)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    return {part: tree[part] for part in parts or PARTS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that has ended, for reading."""
    path = tmp_path_factory.mktemp("state") / "run-7"
    for _ in story(path):
        pass
    return path


def test_a_run_that_is_read_while_it_goes_says_at_each_moment_what_its_directory_says_and_so_at_the_end(tmp_path):
    live = RunState(tmp_path / "run")
    looks = 0
    for _ in story(tmp_path / "run"):
        assert live.refresh()
        assert told(live) == told(RunState(tmp_path / "run"))
        assert not live.refresh()
        looks += 1
    assert live.version == looks
    assert live.snapshot("run")["run"]["outcome"] == "done"


def test_it_tells_who_is_in_the_run_and_where(whole):
    state = told(RunState(whole))
    assert (state["run"]["state"], state["run"]["outcome"], state["run"]["attempts"]) == ("stopped", "done", 1)
    assert (state["run"]["done"], state["run"]["steps"], state["run"]["name"]) == (7, 7, "run-7")
    assert (state["model"]["type"], state["model"]["layers"], state["model"]["experts"]) == ("qwen3_moe", 2, 8)
    now = state["membership"]
    assert (now["epoch"], now["desired"], now["active"], now["waiting"], now["reason"]) == (1, 3, 2, 1, "one is lost")
    assert [(r["rank"], r["member"], r["host"], r["node"], r["state"]) for r in now["ranks"]] == [
        (0, "rank-0", "host-0", 0, "active"), (1, "rank-2", "host-2", 1, "slow"),
    ]  # fmt: skip
    assert [(e["epoch"], e["step"], len(e["ranks"])) for e in now["epochs"]] == [(0, 0, 3), (1, 4, 2)]


def test_each_placement_has_its_cause_its_gain_and_what_moved(whole):
    state = RunState(whole)
    versions = told(state)["placement"]["versions"]
    assert [(v["version"], v["step"], v["cause"], v["epoch"], v["moved"]) for v in versions] == [
        (0, 0, "start", 0, 0), (1, 2, "rebalance", 0, 2), (2, 4, "loss", 1, 2 * 3),
    ]  # fmt: skip
    gains = [(v["gain_predicted"], v["gain_measured"], v["move_seconds"]) for v in versions]
    assert gains == [(None, None, None), (0.01, 0.02, 0.4), (None, None, None)]
    moved = state.moved(0, 1)
    assert [(m.layer, m.expert, m.before, m.after) for m in moved] == [
        (1, 0, ("rank-0", "rank-2"), ("rank-2",)), (1, 7, ("rank-2",), ("rank-0", "rank-2")),
    ]  # fmt: skip
    lost = [(m.expert, m.owner_before, m.owner_after) for m in state.moved(1, 2) if m.layer == 0]
    assert lost == [(e, "rank-1", "rank-2") for e in (3, 4, 5)], "who stays has another number, and has not moved"
    assert state.moved(0, 9) == []


def test_a_move_that_was_broken_off_lends_its_gain_to_no_placement_of_that_number(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "placements").mkdir()
    figures = {"moves": True, "placement_version": 1, "gain_predicted": 0.01, "move_predicted": 0.5}
    run.event(Event("rebalance", "move 2 experts", figures, 2))
    first = contiguous(LAYERS, EXPERTS, 2)
    for placement, cause in ((first, Cause.START), (swapped(first, 0, 1, 5, 1), Cause.LOSS)):
        run.placement(placement)
        run.event(placement_event(placement, cause, "words"))
    assert [v["gain_predicted"] for v in told(RunState(tmp_path))["placement"]["versions"]] == [None, None]


def test_a_placement_that_cannot_be_read_is_not_among_the_versions(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "placements").mkdir()
    for version in range(3):
        run.placement(swapped(contiguous(LAYERS, EXPERTS, 2), 0, version, 5, version))
    (tmp_path / "placements" / "0001.json").write_text("{")
    state = RunState(tmp_path)
    assert state.placements.numbers == [0, 2]
    assert state.placement(1) is None


def test_why_an_expert_sits_where_it_does_is_the_sentence_of_the_change_that_put_it_there(whole):
    state = RunState(whole)
    assert state.why(0, 0) == "placement 0, after step 0: the run began with it"
    assert state.why(1, 7) == "placement 1, after step 2: move 2 experts: pays back in 9 steps"
    assert state.why(0, 4) == "placement 2, after step 4: rank 1 died"
    assert state.why(0, 8) == state.why(2, 0) == state.why(-1, 0) == ""
    assert told(state)["placement"]["since"][1] == [1, 0, 0, 2, 2, 2, 0, 1]


def test_an_earlier_placement_can_be_read_with_the_ranks_of_its_time(whole):
    state = RunState(whole)
    before = state.placement(1)
    assert before["slots"] == swapped(contiguous(LAYERS, EXPERTS, 3), 1, 0, 7, 1).slots.tolist()
    assert (before["cause"], [r["member"] for r in before["ranks"]]) == ("rebalance", list(THREE.members))
    assert state.placement(3) is None


def test_loads_links_and_pairs_are_those_of_the_present(whole):
    state = RunState(whole)
    load, links = told(state)["load"], told(state)["links"]
    assert (load["version"], json.dumps(load["recent_steps"])) == (2, "[4, 7]")
    assert load["run"] == np.arange(16).reshape(2, 8).tolist()
    assert links["sent"] == [[1000.0] * 2] * 2
    assert links["bandwidth"] == [[None] * 2] * 2  # not measured
    assert state.pairs("coactivation", 1).shape == state.pairs("transitions", 0).shape == (EXPERTS, EXPERTS)
    assert state.pairs("transitions", 1) is None


def test_before_the_first_checkpoint_pairs_are_those_of_a_sample_of_recent_tokens(tmp_path):
    for run in story(tmp_path / "run"):
        if len(run.metrics()) == 2:
            break
    state = RunState(tmp_path / "run")
    assert told(state)["load"]["pairs"] == "recent"
    together, onward = state.pairs("coactivation", 0), state.pairs("transitions", 0)
    assert {(i, j): n for (i, j), n in np.ndenumerate(together) if n} == {
        (0, 0): 2, (1, 1): 1, (2, 2): 1, (0, 1): 1, (1, 0): 1, (0, 2): 1, (2, 0): 1,
    }  # fmt: skip
    assert {(i, j): n for (i, j), n in np.ndenumerate(onward) if n} == {
        (0, 3): 1, (0, 4): 2, (1, 3): 1, (1, 4): 1, (0, 5): 1, (2, 4): 1, (2, 5): 1,
    }  # fmt: skip
    assert state.pairs("transitions", 1) is state.pairs("coactivation", 2) is state.pairs("coactivation", -1) is None


def test_a_reader_that_has_seen_a_version_is_given_what_has_changed_since(tmp_path):
    steps = story(tmp_path / "run")
    next(steps)
    state = RunState(tmp_path / "run")
    for run in steps:
        state.refresh()
        if run.metrics():
            break
    seen = state.version
    assert set(state.snapshot(since=seen)) == {"version", "changed"}
    run.step(step(2, 3, 0))
    assert state.refresh()
    assert set(state.snapshot(since=seen)) == {"version", "changed", "run", "steps", "load", "links"}
    seen = state.version
    run.event(Event("balance", "words"))
    state.refresh()
    assert "events" in state.snapshot(since=seen)
    assert "steps" not in state.snapshot(since=seen)


def test_no_secret_of_the_configuration_or_of_an_event_is_told(whole):
    text = json.dumps(told(RunState(whole)))
    assert "pw@" not in text
    assert "s3://***@bucket/step-000007" in text
    assert "s3://***@b/m" in text


def test_of_a_step_that_was_made_again_the_last_line_counts(whole):
    steps = told(RunState(whole))["steps"]
    assert steps["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert steps["columns"]["world_size"] == [3, 3, 3, 2, 2, 2, 2]
    assert steps["phase_seconds"]["forward"] == [0.02] * 7
    assert steps["columns"]["worst_expert_load"] == [1.5] * 7


def test_a_file_that_begins_anew_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 3.0}\n')
    state = RunState(tmp_path)
    path.write_text('{"step": 1, "loss": 9.0}\n')
    assert state.refresh()
    assert told(state)["steps"]["columns"]["loss"] == [9.0]


def test_a_directory_without_any_file_has_a_state(tmp_path):
    state = told(RunState(tmp_path / "nothing"))
    assert (state["run"]["state"], state["run"]["outcome"], state["placement"]["version"]) == ("", "", None)
    assert state["run"]["alive"] is False


def test_of_an_older_run_that_tells_of_no_placement_the_files_tell(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "placements").mkdir()
    for placement in (contiguous(LAYERS, EXPERTS, 2), swapped(contiguous(LAYERS, EXPERTS, 2), 0, 1, 5, 1)):
        run.placement(placement)
    state = RunState(tmp_path)
    assert [(v["version"], v["moved"]) for v in told(state)["placement"]["versions"]] == [(0, 0), (1, 2)]
    assert state.why(0, 5) == "placement 1"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_beginning_of_every_file_is_read_without_an_error(whole, data):
    path = data.draw(st.sampled_from(sorted(p for p in whole.rglob("*") if p.is_file() and p.name != ".gitignore")))
    full = path.read_bytes()
    try:
        path.write_bytes(full[: data.draw(st.integers(0, len(full)))])
        state = RunState(whole)
        told(state)
        state.why(0, 0)
        state.pairs("coactivation", 0)
        state.moved(0, 2)
    finally:
        path.write_bytes(full)


def places(tree):
    """(what holds it, its key or place) of everything in a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        yield from places(value) if isinstance(value, dict | list) else ()


@pytest.mark.parametrize("value", [math.inf, [None]], ids=["infinite", "list"])
@pytest.mark.parametrize(
    ("name", "line", "part"),
    [
        ("config.yaml", 0, "optim"), ("config.yaml", 0, "batch"), ("config.yaml", 0, "model"),
        ("metrics.jsonl", -1, None), ("events.jsonl", 1, None), ("events.jsonl", 3, None),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_anywhere_leaves_a_state_that_json_can_hold(whole, name, line, part, value):
    path, full = whole / name, (whole / name).read_text()
    lines = [full] if name == "config.yaml" else full.splitlines()
    tree = yaml.safe_load(full) if name == "config.yaml" else json.loads(lines[line])
    try:
        for held, key in list(places(tree if part is None else tree[part])):
            held[key], before = value, held[key]
            lines[line] = yaml.safe_dump(tree) if name == "config.yaml" else json.dumps(tree)
            path.write_text("\n".join(lines) + "\n")
            held[key] = before
            state = RunState(whole)
            told(state)
            with suppress(BadInput):
                case_of(state)
    finally:
        path.write_text(full)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_however_a_run_is_read_in_parts_its_state_is_that_of_one_reading(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parts") / whole.name
    shutil.copytree(whole, folder)
    it = SimpleNamespace(**{name.partition(".")[0]: (folder / name).read_bytes() for name in GROWS})
    for name in GROWS:
        (folder / name).write_bytes(b"")
    state = RunState(folder)
    for name in data.draw(st.permutations(GROWS)):
        text = getattr(it, name.partition(".")[0])
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            with (folder / name).open("ab") as file:
                file.write(text[start:end])
            state.refresh()
    assert told(state) == told(RunState(folder))
