"""`ray-ep plan` answers at the level that the run balances at, and prints no figure that counts alone do not tell."""

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.cli.engines.files import read_placement
from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous
from tests.placement.traces import statistics, trace

LINKS = {k: {"bandwidth": b, "latency": "5 us"} for k, b in (("inside", "300 GB/s"), ("across", "25 GB/s"))}
CLUSTER = {"nodes": 1, "ranks_per_node": 8, "links": LINKS}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": [[1] * 64, [0] * 64, [5, *[1] * 63]]}))
    RoutingStatistics(np.ones((2, 64), np.int64)).save("counts.npz")
    return tmp_path


@pytest.fixture
def run_dir(place):
    """One node of 2 ranks, its busy experts all on the first."""
    run = place / "run"
    (run / "placements").mkdir(parents=True)
    (run / "statistics").mkdir()
    sets = np.sort(trace(2, 8, 2, 900), axis=2) // 2  # experts 0 to 3 alone
    statistics(np.stack([sets[:, :, 0], (sets[:, :, 0] + 1) % 4], 2), 8).save(run / "statistics" / "routing.npz")
    (run / "topology.json").write_text(Topology.of_nodes([0, 0]).to_json())
    (run / "placements" / "0000.json").write_text(contiguous(2, 8, 2).to_json())
    return run


def told(*arguments, verb="plan"):
    result = CliRunner().invoke(main, [verb, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("config", "level", "why"),
    [
        ("balance: {in_step: 'off'}", "rank", "the run's balance.in_step is off"),
        ("balance: {in_step: off}", "rank", "the run's balance.in_step is off"),
        ("balance: {in_step: always}", "node", "the run's balance.in_step is always"),
        ("placement: {level: rank}", "rank", "the run's placement.level is rank"),
        ("batch: {length: 8}", "node", "the run's balance.in_step is auto"),
    ],
)
def test_the_level_is_the_runs_own_and_said(run_dir, config, level, why):
    (run_dir / "config.yaml").write_text(config)
    said = json.loads(told(run_dir, "--json"))
    assert said["level"] == level
    assert any(n.startswith(f"level {level}: {why}") for n in said["notes"])
    current, planned = (next(p for p in said["placements"] if p["name"] == n) for n in ("current", "plan"))
    faster = planned["compute_seconds"] < 0.7 * current["compute_seconds"]
    assert faster == (level == "rank"), "where ranks are evened out in the step, other places gain nothing"
    assert f"level {level}: {why}" in told(run_dir)
    assert json.loads(told(run_dir, "--level", "node", "--json"))["level"] == "node"


@pytest.mark.parametrize(("before", "level"), [(1.25, "rank"), (1.9, "node")])
def test_a_run_whose_balance_did_not_pay_is_planned_by_rank(run_dir, before, level):
    (run_dir / "config.yaml").write_text("balance: {in_step: auto}")
    line = {"step": 1, "balancedness": 0.8, "imbalance_before": before, "guests": 0}
    (run_dir / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 12)
    assert json.loads(told(run_dir, "--json"))["level"] == level


@pytest.mark.parametrize("file", ["counts.json", "counts.npz"])
def test_what_counts_do_not_tell_is_no_figure(place, file):
    arguments = (file, "-t", "cluster.yaml", "--slots", 9, "--html", "p.html")
    words = told(*arguments)
    row = next(x for x in words.splitlines() if x.startswith("plan "))
    assert row.split()[5:10].count("-") == 2, row
    assert "of counts alone: " in words
    assert "Traffic" not in (place / "p.html").read_text()
    said = json.loads(told(*arguments, "--json"))
    for p in said["placements"]:
        assert (p["remote_nodes"], p["traffic_seconds"]) == (None, None)
        assert p["step_seconds"] == pytest.approx(p["compute_seconds"])
    rows = [json.loads(x) for x in told(file, "--nodes", "1,2", "--json", verb="simulate").splitlines()]
    for r in rows[:-1]:
        assert [r[k] for k in ("remote_nodes", "remote_ranks", "traffic_seconds", "bytes_across")] == [None] * 4
    assert rows[-1]["answer"].startswith("Of compute alone")
    assert "nan" not in told(file, "--nodes", "1,2", "--html", "s.html", verb="simulate").lower()


def test_safety_of_counts_alone_has_a_price_in_memory_only(place):
    (place / "two.yaml").write_text(yaml.safe_dump({**CLUSTER, "nodes": 2}))
    said = json.loads(told("counts.npz", "-t", "two.yaml", "--survive-nodes", 1, "--json"))
    assert said["survival_price"]["remote_nodes"] is None
    assert "remote nodes a token" not in told("counts.npz", "-t", "two.yaml", "--survive-nodes", 1)


@pytest.mark.parametrize("slots", [9, 12, 14])
@pytest.mark.parametrize(
    ("engine", "file"), [("sglang", "x.json"), ("tensorrt-llm", "x.yaml"), ("vllm-ascend", "x.json")]
)
def test_even_experts_on_8_ranks_are_written_for_an_engine_with_the_numbers(place, slots, engine, file):
    words = told("counts.json", "-t", "cluster.yaml", "--slots", slots, "--engine", engine, "--out", file)
    assert words.splitlines()[-2:] == [
        f"2 layers, 8 ranks x {slots} slots, 64 experts and {8 * slots - 64} replicas a layer",
        f"written: {file} ({engine})",
    ]
    assert (read_placement(file, 8, None if engine == "vllm-ascend" else [0, 2]).slots >= 0).all()


def test_more_slots_than_experts_are_filled_as_far_as_they_are_of_use_and_that_is_said(place):
    RoutingStatistics(np.ones((1, 4), np.int64)).save("few.npz")
    now = np.full((1, 8, 6), -1)
    now[:, :, :4] = np.arange(4)
    (place / "now.json").write_text(Placement(now, 4).to_json())
    for more in ((), ("--current", "now.json")):
        arguments = ("few.npz", "-t", "cluster.yaml", "--slots", 6, "--engine", "sglang", "--out", "x.json", *more)
        words = told(*arguments)
        assert "6 slots for 4 experts: 4 are filled, more would hold an expert twice" in words
        assert read_placement("x.json", 8).slots.shape == (1, 8, 4)
