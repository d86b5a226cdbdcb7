"""`ray-ep plan`: what it prints, writes and refuses. No cluster, no torch."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.cli.engines.files import read_placement
from ray_ep.cli.plan import inputs as plan_inputs
from ray_ep.errors import BadInput
from ray_ep.observe.state import RunState
from ray_ep.observe.state.case import case_of, measured_of
from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology, contiguous, plan, predict
from ray_ep.placement.compare import CURRENT, candidates, compare, verdict
from ray_ep.placement.planner.survive import survives
from ray_ep.placement.planner.verdict import Question, decide
from tests.browser import data_of
from tests.placement.traces import statistics, trace

LAYERS, EXPERTS, TOP_K = 3, 16, 4
CLUSTER = {
    "nodes": 2,
    "ranks_per_node": 2,
    "links": {
        "inside": {"bandwidth": "300 GB/s", "latency": "5 us"},
        "across": {"bandwidth": "25 GB/s", "latency": "20 us"},
    },
}


@pytest.fixture
def recorded():
    return statistics(trace(LAYERS, EXPERTS, TOP_K, 1500), EXPERTS)


@pytest.fixture
def place(tmp_path, monkeypatch, recorded):
    """A working directory with statistics, a described cluster and a placement."""
    monkeypatch.chdir(tmp_path)
    recorded.save("routing.npz")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    (tmp_path / "now.json").write_text(contiguous(LAYERS, EXPERTS, 4, 5).to_json())
    return tmp_path


@pytest.fixture
def run_dir(place, recorded):
    """What a run on two nodes leaves, as far as the planner reads it."""
    run = place / "run"
    (run / "placements").mkdir(parents=True)
    (run / "statistics").mkdir()
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    recorded.save(run / "statistics" / "routing.npz")
    node_of = np.array([0, 0, 1, 1])
    near = node_of[:, None] == node_of
    (run / "topology.json").write_text(Topology(np.where(near, 2e9, 1e8), np.full((4, 4), 1e-4), node_of).to_json())
    (run / "placements" / "0000.json").write_text(contiguous(LAYERS, EXPERTS, 4).to_json())
    (run / "config.yaml").write_text(
        yaml.safe_dump({"model": {"dtype": "bfloat16"}, "batch": {"sequences": 8, "length": 32}})
    )
    model = {"hidden_size": 64, "moe_intermediate_size": 32}
    (run / "checkpoints" / "step-000002" / "manifest.json").write_text(json.dumps({"model": model}))
    lines = [
        {"step": s, "tokens": 256, "world_size": 4, "expert_seconds": t} for s, t in ((1, 9.0), (2, 0.3), (3, 0.3))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 4, "tok')
    return run


def told(*arguments):
    result = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def figures(*arguments):
    return json.loads(told(*arguments, "--json"))


def refused(*arguments):
    result = CliRunner().invoke(main, ["plan", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_table_has_a_row_a_placement_and_the_advice_follows(place):
    words = told("routing.npz", "-t", "cluster.yaml", "--slots", 5)
    lines = words.splitlines()
    assert lines[0].startswith("3 layers x 16 experts on 4 ranks of 2 node(s), 5 slots a rank; level node")
    head = lines.index(next(x for x in lines if x.startswith("placement")))
    assert [x.split()[0] for x in lines[head + 1 : head + 5]] == ["contiguous", "random", "load-only", "plan"]
    assert "pays back in" in words


def test_the_figures_are_those_of_the_cost_model_and_the_plan_is_the_planners(place, recorded):
    said = figures("routing.npz", "-t", "cluster.yaml", "--slots", 5, "--current", "now.json", "--level", "rank")
    by_name = {p["name"]: p for p in said["placements"]}
    assert list(by_name) == ["current", "contiguous", "random", "load-only", "plan"]
    node_of = np.array([0, 0, 1, 1])
    near = node_of[:, None] == node_of
    topology = Topology(np.where(near, 300e9, 25e9), np.where(near, 5e-6, 20e-6), node_of)
    now = Placement.load("now.json")
    best = plan(recorded, topology, 5, now, level="rank")
    for name, placement in (("current", now), ("plan", best)):
        expected = predict(placement, recorded, topology, StepCosts(), "rank")
        assert by_name[name]["step_seconds"] == pytest.approx(expected.step_seconds)
        assert by_name[name]["balancedness"] == pytest.approx(expected.balancedness)
        assert by_name[name]["remote_nodes"] == pytest.approx(expected.remote_nodes.mean())
    assert by_name["current"]["moved_slots"] is None
    assert by_name["contiguous"]["moved_slots"] == 0, "what runs now is contiguous"
    moved, costs = by_name["plan"], StepCosts()
    expected = moved["moved_slots"] * costs.expert_bytes + moved["moved_owners"] * costs.optimizer_bytes
    assert moved["migration_bytes"] == pytest.approx(expected)
    assert moved["step_seconds"] < by_name["current"]["step_seconds"]


def test_planning_again_from_the_plan_says_stay(place):
    told("routing.npz", "-t", "cluster.yaml", "--slots", 5, "--out", "plan.json")
    said = figures("routing.npz", "-t", "cluster.yaml", "--current", "plan.json")
    assert said["advice"][0].startswith("stay: no other places are worth a move (step ")
    assert {p["name"]: p["moved_slots"] for p in said["placements"]}["plan"] == 0


def test_a_move_that_does_not_pay_back_within_the_horizon_is_no_advice(place):
    arguments = (*BASE, "--current", "now.json", "--level", "rank")
    assert figures(*arguments)["advice"][0].startswith("move ")
    assert figures(*arguments, "--horizon", "1e-6")["advice"][0].startswith("stay: ")


def test_a_run_directory_tells_topology_placement_and_costs(run_dir):
    said = figures(run_dir)
    assert said["placements"][0]["name"] == said["compared_with"] == "current"
    costs = next(n for n in said["notes"] if n.startswith("costs: "))
    assert costs == (
        "costs: the run's own: tokens_per_rank, token_bytes, expert_seconds, expert_bytes, optimizer_bytes"
    )
    moved = next(p for p in said["placements"] if p["name"] == "plan")
    weights = 3 * 64 * 32
    assert moved["migration_bytes"] == moved["moved_slots"] * weights * 2 + moved["moved_owners"] * weights * 12
    # A layer of the run: 0.3 s x 4 ranks for 256 tokens x 4 experts x 3 layers, on 64 tokens a rank.
    even = 3 * 64 * TOP_K * 0.3 * 4 / (256 * 3 * TOP_K)
    assert all(
        p["compute_seconds"] * p["node_balancedness"] == pytest.approx(even, rel=0.05) for p in said["placements"]
    )


def test_a_run_is_planned_for_another_cluster_without_its_own_placement(run_dir):
    larger = {**CLUSTER, "nodes": 4}
    (run_dir.parent / "larger.yaml").write_text(yaml.safe_dump(larger))
    said = figures(run_dir, "-t", "larger.yaml")
    assert (said["ranks"], said["nodes"], said["compared_with"]) == (8, 4, "contiguous")
    other = figures("routing.npz", "-t", run_dir)
    assert (other["ranks"], other["nodes"]) == (4, 2)


def test_the_answer_for_a_run_is_the_one_that_the_running_job_comes_to(run_dir, recorded):
    lines = [
        {"step": s, "step_seconds": 9.0, "expert_seconds": 0.3, "exchange_seconds": 0.1, "tokens": 256, "world_size": 4}
        for s in range(6)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    topology = Topology.from_json((run_dir / "topology.json").read_text())
    found = plan_inputs.read_costs((), plan_inputs.run_of(run_dir), plan_inputs.read_recorded(run_dir, None), 4, None)
    asked = Question(
        recorded, topology, contiguous(LAYERS, EXPERTS, 4), 4, found.figures, "node", 1000, step_seconds=9.0,
        moe_seconds=0.4,
    )  # fmt: skip
    assert figures(run_dir)["advice"][0] == decide(asked).words
    assert "would gain too little: predicted step 9000 -> " in decide(asked).words
    assert figures(run_dir, "--cost", "token_bytes=1e6")["advice"][0].startswith("move "), (
        "of other steps than the run's"
    )


def test_from_python_a_run_is_planned_as_the_command_plans_it(run_dir):
    run = RunState(run_dir)
    found = compare(case_of(run), candidates(case_of(run), run.placements.newest), CURRENT)
    said = figures(run_dir)
    assert {c.name: c.prediction.step_seconds for c in found} == {
        p["name"]: p["step_seconds"] for p in said["placements"]
    }
    assert verdict(case_of(run), found, CURRENT, measured_of(run)).words == said["advice"][0]
    wider = case_of(run, slots=5)
    assert plan(wider.statistics, wider.topology, wider.slots, costs=wider.costs).slots.shape == (LAYERS, 4, 5)


def test_before_the_first_checkpoint_a_run_is_planned_by_loads_and_a_sample_of_recent_tokens(run_dir, recorded):
    (run_dir / "statistics" / "routing.npz").unlink()
    with pytest.raises(BadInput, match="run: statistics cannot be read there: a run has them after its first steps"):
        case_of(RunState(run_dir))
    np.savez(run_dir / "statistics" / "sample.npz", sample=recorded.sample)
    window = {"load": recorded.load, "recent": recorded.load, "ranks": np.ones((LAYERS, 4)), "sent": np.ones((4, 4))}
    spans = {"steps": [1, 3], "recent_steps": [1, 3], "recent_seconds": 1.0}
    np.savez(run_dir / "statistics" / "load-0000.npz", **window, **spans)
    case = case_of(RunState(run_dir))
    assert np.array_equal(case.statistics.load, recorded.load)
    assert np.array_equal(case.statistics.sample, recorded.sample)
    assert case.costs.tokens_per_rank == 64
    (run_dir / "topology.json").write_text("{")
    with pytest.raises(BadInput, match=r"run: topology\.json cannot be read there"):
        case_of(RunState(run_dir))


def test_a_cost_that_is_given_wins(run_dir):
    slow = figures(run_dir, "--cost", "expert_seconds=1", "--cost", "token_bytes=0")
    for p in slow["placements"]:
        assert p["compute_seconds"] > 3 * 64 * TOP_K
        assert p["traffic_seconds"] < 0.01, "latency alone"


def test_the_advice_speaks_of_what_is_not_balanced_in_the_step(place):
    by = {x: figures(*BASE, "--slots", 5, "--level", x)["advice"] for x in ("node", "rank")}
    for level, words in by.items():
        assert all(f"the busiest {level} has" in w for w in words if ": the busiest" in w)
        assert any(": the busiest" in w for w in words)


def test_slow_nodes_get_less(place):
    (place / "mixed.yaml").write_text(yaml.safe_dump({**CLUSTER, "speeds": [1, 0.25]}))
    told("routing.npz", "-t", "mixed.yaml", "--slots", "6,6,3,3", "--out", "plan.json")
    slots = Placement.load("plan.json").slots
    assert ((slots >= 0).sum(2) <= [6, 6, 3, 3]).all()
    said = {p["name"]: p for p in figures("routing.npz", "-t", "mixed.yaml", "--slots", "6,6,3,3")["placements"]}
    assert said["plan"]["step_seconds"] < said["load-only"]["step_seconds"]


@pytest.mark.parametrize(
    ("engine", "file"),
    [("ray_ep", "p.json"), ("sglang", "p.json"), ("tensorrt-llm", "p.yaml"), ("vllm-ascend", "p.json")],
)
def test_the_plan_is_written_in_the_engines_own_format(place, engine, file):
    words = told("routing.npz", "-t", "cluster.yaml", "--slots", 5, "--out", file, "--engine", engine)
    assert words.splitlines()[-1] == f"written: {file} ({engine})"
    placement = read_placement(file, 4)
    assert placement.slots.shape == (LAYERS, 4, 5)


def test_another_engines_record_is_planned_by_rank_with_serving_costs_into_its_own_format(place, recorded):
    document = {"logical_count": recorded.load[None].tolist()}
    (place / "record.json").write_text(json.dumps(document))
    said = figures("record.json", "-t", "cluster.yaml", "--slots", 5, "--out", "map.json")
    assert (said["engine"], said["level"]) == ("sglang", "rank")
    assert "physical_to_logical_map" in json.loads((place / "map.json").read_text())
    assert any("Remote nodes are unknown" in x for x in said["advice"])
    assert any("any replica, near or far" in x for x in said["advice"])
    moved = next(p for p in said["placements"] if p["name"] == "plan")
    assert moved["moved_owners"] > 0
    assert moved["migration_bytes"] == moved["moved_slots"] * StepCosts().expert_bytes


def test_a_plan_that_outlives_a_node_states_its_price(place, recorded):
    said = figures(*BASE, "--slots", 10, "--current", "now.json", "--survive-nodes", 1, "--out", "safe.json")
    safe, node_of = Placement.load("safe.json"), np.array([0, 0, 1, 1])
    assert survives(safe, node_of, 1)
    by_name = {p["name"]: p for p in said["placements"]}
    assert list(by_name)[-2:] == ["unprotected", "plan"]
    paid = said["survival_price"]
    assert said["survive_nodes"] == 1
    assert paid["step_seconds"] == pytest.approx(
        by_name["plan"]["step_seconds"] - by_name["unprotected"]["step_seconds"]
    )
    assert paid["remote_nodes"] == pytest.approx(
        by_name["plan"]["remote_nodes"] - by_name["unprotected"]["remote_nodes"]
    )
    assert said["advice"][0].startswith("move ")
    assert said["advice"][0].endswith("so that every expert outlives 1 lost node(s)")
    few = figures(*BASE, "--slots", 8, "--current", "now.json", "--survive-nodes", 1)
    assert not any(w.startswith("load-only: ") for w in few["advice"]), "it cannot lose a node"
    words = told(*BASE, "--slots", 10, "--current", "now.json", "--survive-nodes", 1)
    assert "any node may go and every expert keeps a replica; that costs, against the unprotected plan: " in words
    again = figures(*BASE, "--current", "safe.json", "--survive-nodes", 1)
    assert again["advice"][0].startswith("stay: ")
    assert figures(*BASE)["survival_price"] is None


def test_safety_without_slots_takes_the_fewest_that_do_and_their_memory_is_the_price(place):
    said = figures(*BASE, "--survive-nodes", 1, "--out", "safe.json")
    assert Placement.load("safe.json").slots.shape[2] == 8
    assert said["survival_price"]["slots"] == LAYERS * EXPERTS
    assert said["survival_price"]["bytes"] == LAYERS * EXPERTS * StepCosts().expert_bytes
    assert "8 slots a rank" in said["notes"][0]


def test_heat_maps_and_page_are_whole(place):
    told("routing.npz", "-t", "cluster.yaml", "--current", "now.json", "--html", "p.html", "--plots", "maps/of")
    files = sorted(p.name for p in (place / "maps" / "of").iterdir())
    assert files == ["load-current.svg", "load-plan.svg", "traffic-current.svg", "traffic-plan.svg"]
    for file in files:
        ElementTree.parse(place / "maps" / "of" / file)
        assert "of the mean" in (text := (place / "maps" / "of" / file).read_text()) or "MB a step" in text
    page = data_of((place / "p.html").read_text())
    assert [chart["title"].split(":")[0] for chart in page["charts"]] == [
        "Load of ranks, current", "Load of ranks, plan", "Traffic, current", "Traffic, plan",
    ]  # fmt: skip
    assert len({chart["top"] for chart in page["charts"]}) == 2  # colours of a kind mean the same
    assert "load-only" in [row[0] for row in page["rows"]]


def nan_topology(place):
    tree = json.loads(Topology(np.full((4, 4), 1e9), np.zeros((4, 4)), [0, 0, 1, 1]).to_json())
    tree["bandwidth"][0][3] = float("nan")
    (place / "nan.json").write_text(json.dumps(tree))


def other_model(place):
    RoutingStatistics(np.ones((2, 8), np.int64)).save(place / "other.npz")


def six_ranks(place):
    (place / "six.json").write_text(Topology.of_nodes([0, 0, 0, 1, 1, 1]).to_json())


def damaged(place):
    (place / "half.npz").write_bytes((place / "routing.npz").read_bytes()[:2000])
    (place / "half.json").write_text((place / "now.json").read_text()[:50])
    (place / "half.yaml").write_text("nodes: [\n")
    (place / "empty.json").touch()


BASE = ("routing.npz", "-t", "cluster.yaml")


@pytest.mark.parametrize(
    ("made", "arguments", "says"),
    [
        (None, (*BASE, "--slots", 3), "gives 12 slots for 16 experts: at least 4 a rank"),
        (None, (*BASE, "--slots", "4,4"), "--slots '4,4': expected a number of slots, or 4 with commas"),
        (None, (*BASE, "--slots", 7, "--survive-nodes", 1), "needs every one of 16 experts on 2 nodes, 32 slots"),
        (None, (*BASE, "--survive-nodes", 2), "survive_nodes=2 of 2 nodes: at most 1 may be lost"),
        (None, (*BASE, "--survive-nodes", -1), "-1 is not in the range"),
        (None, (*BASE, "--slots", "many"), "--slots 'many'"),
        (six_ranks, ("routing.npz", "-t", "six.json", "--current", "now.json"), "4 ranks, the topology has 6"),
        (nan_topology, ("routing.npz", "-t", "nan.json"), "nan.json: topology: bandwidth must be positive"),
        (other_model, ("other.npz", "-t", "cluster.yaml", "--current", "now.json"), "must be of one model"),
        (damaged, ("half.npz", "-t", "cluster.yaml"), "half.npz: a damaged"),
        (damaged, (*BASE, "--current", "half.json"), "half.json"),
        (damaged, ("routing.npz", "-t", "half.yaml"), "half.yaml: neither JSON nor YAML"),
        (damaged, ("routing.npz", "-t", "empty.json"), "empty.json: is no mapping: expected one"),
        (damaged, ("empty.json", "-t", "cluster.yaml"), "empty.json: an empty file"),
        (None, ("routing.npz",), "--topology is needed"),
        (None, ("nowhere.npz", "-t", "cluster.yaml"), "nowhere.npz: no such file"),
        (None, ("routing.npz", "-t", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (None, (*BASE, "--current", "nowhere.json"), "nowhere.json: no such file"),
        (None, (*BASE, "--engine", "sglang"), "give --out FILE"),
        (None, (*BASE, "--slots", 5, "--engine", "sglang", "--out", "map.txt"), "map.txt: SGLang reads a map from"),
        (None, (*BASE, "--out", "no/where.json"), "no/where.json"),
        (None, (*BASE, "--html", "no/where.html"), "no/where.html"),
        (None, (*BASE, "--horizon", "nan"), "horizon_steps=nan"),
        (None, (*BASE, "--cost", "tokens=3"), "--cost 'tokens=3': expected NAME=VALUE"),
        (None, (*BASE, "--cost", "token_bytes=-3"), "--cost 'token_bytes=-3'"),
        (None, (*BASE, "--level", "host"), "'host' is not one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(place, made, arguments, says):
    if made:
        made(place)
    before = sorted(place.rglob("*"))
    assert says in refused(*arguments)
    assert sorted(place.rglob("*")) == before


def test_a_run_without_statistics_or_topology_says_so(run_dir):
    (run_dir / "topology.json").unlink()
    assert "topology.json: no such file" in refused(run_dir)
    (run_dir / "statistics" / "routing.npz").unlink()
    assert "has no statistics/routing.npz yet" in refused(run_dir)


def test_neither_torch_nor_ray_is_loaded(place):
    program = (
        "import sys; from ray_ep.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", program, "plan", *BASE, "--html", "p.html"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"  # before it, on a slow machine, what it is at
