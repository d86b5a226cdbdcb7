"""`ray-ep simulate`: what it prints and refuses. No cluster, no torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.cli.simulate.run import LINKS_IN_A_MINUTE
from ray_ep.placement import StepCosts, Topology, plan, predict
from tests.browser import data_of
from tests.placement.traces import statistics, trace

SMALL = ("--synthetic", "layers=2,experts=16,top_k=4,tokens=512")
CLUSTER = {
    "nodes": 2,
    "ranks_per_node": 2,
    "links": {
        "inside": {"bandwidth": "300 GB/s", "latency": "5 us"},
        "across": {"bandwidth": "25 GB/s", "latency": "20 us"},
    },
    "speeds": [1, 0.5],
}


@pytest.fixture
def recorded():
    return statistics(trace(3, 16, 4, 1500), 16)


@pytest.fixture
def place(tmp_path, monkeypatch, recorded):
    monkeypatch.chdir(tmp_path)
    recorded.save("routing.npz")
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return tmp_path


@pytest.fixture
def run_dir(place, recorded):
    run = place / "run"
    (run / "statistics").mkdir(parents=True)
    recorded.save(run / "statistics" / "routing.npz")
    node_of = np.array([0, 0, 1, 1])
    near = node_of[:, None] == node_of
    (run / "topology.json").write_text(Topology(np.where(near, 2e9, 1e8), np.full((4, 4), 1e-4), node_of).to_json())
    overrides = {"hidden_size": 64, "moe_intermediate_size": 32}
    config = {"model": {"dtype": "bfloat16", "overrides": overrides}, "batch": {"sequences": 8, "length": 32}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def told(*arguments):
    result = CliRunner().invoke(main, ["simulate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*arguments):
    """The rows and the last line."""
    found = [json.loads(line) for line in told(*arguments, "--json").splitlines()]
    assert set(found[-1]) == {"answer", "notes"}
    return found[:-1], found[-1]


def refused(*arguments):
    result = CliRunner().invoke(main, ["simulate", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_the_table_has_a_row_for_each_combination_and_ends_with_the_answer():
    lines = told(*SMALL, "--nodes", "1,2", "--ranks-per-node", "2,4", "--slots", "8,16").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("cluster"))
    assert [tuple(line.split()[:4]) for line in lines[head + 1 : head + 9]] == [
        (n, "x", r, s) for n in "12" for r in "24" for s in ("8", "16")
    ]
    assert lines[-1].startswith("Best is ")
    assert lines[0] == "2 layers x 16 experts; level node"


def test_ranks_that_share_network_cards_take_longer():
    same = (*SMALL, "--nodes", "2", "--across", "1 GB/s", "--inside", "100 GB/s", "--placement", "contiguous")
    (alone,), _ = rows(*same)
    (shared,), last = rows(*same, "--lanes", "1")
    assert shared["traffic_seconds"] > 1.5 * alone["traffic_seconds"]
    assert any("for 1 ranks of a node at once" in n for n in last["notes"])


def test_the_answer_names_the_best_row_and_says_where_more_stop_paying():
    found, last = rows(*SMALL, "--nodes", "1,2,4,8", "--across", "1 GB/s", "--inside", "100 GB/s")
    best = max(found, key=lambda r: r["tokens_per_gpu"])
    assert best["nodes"] == 1
    words = "Best is 1 node (8 ranks) with 2 slots a rank, placed by plan: most tokens a GPU"
    assert last["answer"].startswith(f"{words}, {best['tokens_per_gpu']:,.0f}/s")
    assert "more than 8 GPUs do not pay: up to 16, each added brings nothing" in last["answer"]
    even = ("--synthetic", "layers=2,experts=16,top_k=4,tokens=512,zipf=0,focus=0", "--cost", "expert_seconds=1")
    found, last = rows(*even, "--nodes", "1,2")
    assert found[1]["tokens_per_second"] > 1.5 * found[0]["tokens_per_second"]
    assert "adding GPUs pays up to 16, the largest that was tried" in last["answer"]


def test_the_figures_of_a_described_cluster_are_those_of_the_cost_model(place, recorded):
    (row,), _ = rows("routing.npz", "-t", "cluster.yaml", "--slots", 5)
    node_of = np.array([0, 0, 1, 1])
    near = node_of[:, None] == node_of
    topology = Topology(np.where(near, 300e9, 25e9), np.where(near, 5e-6, 20e-6), node_of)
    costs = StepCosts(speed=(1.0, 1.0, 0.5, 0.5))
    placement = plan(recorded, topology, 5, costs=costs)
    expected = predict(placement, recorded, topology, costs, "node")
    assert row["step_seconds"] == pytest.approx(expected.step_seconds)
    assert row["node_balancedness"] == pytest.approx(expected.node_balancedness)
    assert row["tokens_per_second"] == pytest.approx(4 * 4096 / expected.step_seconds)
    assert (row["nodes"], row["ranks"], row["gpu"]) == (2, 4, None)
    owned = np.bincount(placement.owner.ravel(), minlength=4)
    filled = (placement.slots >= 0).sum((0, 2))
    assert row["memory_bytes"] == (filled * costs.expert_bytes + owned * costs.optimizer_bytes).max()


def test_a_run_is_grown_with_its_own_links_and_its_batch_stays_the_same(run_dir):
    (own,), _ = rows("run")
    assert (own["nodes"], own["ranks"], own["tokens_per_rank"]) == (2, 4, 64)
    grown, last = rows("run", "--nodes", "2,4")
    assert [(r["nodes"], r["ranks"], r["tokens_per_rank"]) for r in grown] == [(2, 4, 64), (4, 8, 32)]
    assert grown[0]["step_seconds"] == pytest.approx(own["step_seconds"])
    assert any("2 GB/s inside a node after 100 us, 100 MB/s across nodes" in n for n in last["notes"])
    assert own["memory_bytes"] == 3 * 4 * (3 * 64 * 32) * (2 + 12)
    faster, _ = rows("run", "--across", "1 GB/s")
    assert faster[0]["traffic_seconds"] < own["traffic_seconds"]


def test_the_tokens_of_a_step_are_divided_among_the_ranks():
    found, _ = rows(*SMALL, "--nodes", "1,2", "--tokens", 32000)
    assert [r["tokens_per_rank"] for r in found] == [4000, 2000]


def test_kinds_of_gpus_differ_in_speed_links_and_memory_and_the_price_decides():
    flags = (*SMALL, "--nodes", 2, "--ranks-per-node", 4)
    (h100, l4), last = rows(*flags, "--gpu", "h100", "--gpu", "l4")
    assert (h100["gpu"], l4["gpu"]) == ("h100", "l4")
    assert l4["compute_seconds"] > 7 * h100["compute_seconds"]
    assert l4["traffic_seconds"] > h100["traffic_seconds"]
    assert "(8 h100)" in last["answer"]
    assert [n for n in last["notes"] if n.startswith("links inside nodes of l4 are less than 1.5 times as fast")]
    (_, own), last = rows(*flags, "--gpu", "h100:price=50", "--gpu", "own:speed=0.5,inside=100 GB/s,price=1")
    assert "(8 own) with 2 slots a rank, placed by plan: most tokens for the price" in last["answer"]
    assert own["tokens_per_price"] == pytest.approx(own["tokens_per_gpu"] * 3600)
    (tiny, _), last = rows(*flags, "--gpu", "tiny:speed=9,memory_gb=0.1", "--gpu", "h100")
    assert not tiny["fits"]
    assert "(8 h100)" in last["answer"], "what does not fit is no answer"
    _, last = rows(*flags, "--gpu", "tiny:memory_gb=0.1")
    assert last["answer"].startswith("Nothing fits: the experts of 2 nodes (8 tiny)")


def test_few_layers_stand_for_many_and_it_is_said():
    (whole,), _ = rows("--synthetic", "layers=12,experts=16,top_k=4,zipf=0", "--nodes", 2)
    (part,), last = rows("--synthetic", "layers=12,experts=16,top_k=4,zipf=0", "--nodes", 2, "--layers", 4)
    assert part["step_seconds"] == pytest.approx(whole["step_seconds"], rel=0.1)
    assert part["memory_bytes"] == whole["memory_bytes"]
    assert "4 of the 12 layers, evenly spaced, are predicted and stand for all (--layers)" in last["notes"]


@pytest.mark.slow
def test_four_thousand_ranks_are_simulated_on_as_many_layers_as_a_minute_has_room_for():
    flags = ("--synthetic", "layers=58,experts=256,top_k=8,tokens=1024", "--nodes", "512")
    (row,), last = rows(*flags, "--layers", 2)
    assert (row["ranks"], row["slots_per_rank"], row["placement"]) == (4096, 1, "load-only")
    assert 0 < row["node_balancedness"] <= 1
    assert any(n.startswith("load-only: clusters of more than 2048 slots") for n in last["notes"])
    assert 58 * row["ranks"] ** 2 <= LINKS_IN_A_MINUTE, "without --layers all are predicted"


def test_combinations_without_room_are_left_out_and_named():
    found, last = rows(*SMALL, "--nodes", "1,2", "--slots", 1)
    assert [r["ranks"] for r in found] == [16]
    assert (
        "left out, fewer slots than the 16 experts of a layer: 1 node(s), 8 ranks x 1 slots: 2 are needed"
        in (last["notes"])
    )


def test_the_page_holds_table_answer_and_plot(place):
    words = told(*SMALL, "--nodes", "1,2", "--gpu", "h100", "--gpu", "l4", "--html", "p.html")
    text = (place / "p.html").read_text()
    page = data_of(text)
    assert '<h1 id="name">Clusters compared</h1>' in text
    assert page["words"] == [words.splitlines()[-1]]
    assert "2 x 8 l4" in [row[0] for row in page["rows"]]
    (growth,) = page["charts"]
    assert all(curve["x"] == [8, 16] and min(curve["y"]) > 0 for curve in growth["curves"])


def bad_topology(place):
    tree = json.loads(Topology(np.full((4, 4), 1e9), np.zeros((4, 4)), [0, 0, 1, 1]).to_json())
    tree["bandwidth"][0][3] = -1.0
    (place / "negative.json").write_text(json.dumps(tree))
    (place / "half.npz").write_bytes((place / "routing.npz").read_bytes()[:2000])
    (place / "half.yaml").write_text("nodes: [\n")


NODES = ("--nodes", 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (NODES, "give STATISTICS"),
        (("routing.npz", *SMALL, *NODES), "one of them"),
        (("nowhere.npz", *NODES), "nowhere.npz: no such file"),
        (("half.npz", *NODES), "half.npz: a damaged"),
        (SMALL, "--nodes or --topology is needed"),
        ((*SMALL, "-t", "nowhere.yaml"), "nowhere.yaml: no such file"),
        ((*SMALL, "-t", "half.yaml"), "half.yaml: neither JSON nor YAML"),
        ((*SMALL, "-t", "negative.json"), "negative.json: topology: bandwidth must be positive"),
        ((*SMALL, "--nodes", "0"), "--nodes '0': expected a number of at least 1"),
        ((*SMALL, "--nodes", "two"), "--nodes 'two'"),
        ((*SMALL, "--nodes", 1024), "8192 ranks: at most 4096"),
        ((*SMALL, *NODES, "--slots", "1,x"), "--slots '1,x'"),
        ((*SMALL, "--nodes", 1, "--slots", 1), "fewer slots than the 16 experts of a layer: 1 node(s), 8 ranks"),
        ((*SMALL, "-t", "cluster.yaml", "--slots", 3), "fewer slots than the 16 experts of a layer"),
        ((*SMALL, *NODES, "--inside", "nan"), "--inside='nan': expected a positive number"),
        ((*SMALL, *NODES, "--across", "-3 GB/s"), "--across='-3 GB/s'"),
        ((*SMALL, *NODES, "--latency-across", "soon"), "--latency-across='soon'"),
        ((*SMALL, *NODES, "--speeds", "1,0"), "speeds=(1.0, 0.0): expected finite positive"),
        ((*SMALL, *NODES, "--speeds", "1,x"), "--speeds '1,x'"),
        ((*SMALL, *NODES, "--gpu", "abacus"), "gpu 'abacus': known are b200"),
        ((*SMALL, *NODES, "--gpu", "h100:cost=3"), "gpu h100: 'cost=3': expected KEY=VALUE"),
        ((*SMALL, *NODES, "--gpu", "h100:price=0"), "gpu h100: price=0: expected a positive number"),
        ((*SMALL, *NODES, "--gpu", "own:inside=fast"), "gpu own: inside='fast'"),
        ((*SMALL, *NODES, "--placement", "best"), "--placement 'best': allowed are contiguous, load-only, plan"),
        ((*SMALL, *NODES, "--cost", "tokens=3"), "--cost 'tokens=3': expected NAME=VALUE"),
        ((*SMALL, *NODES, "--tokens", 9, "--cost", "tokens_per_rank=3"), "--tokens and --cost tokens_per_rank"),
        ((*SMALL, *NODES, "--html", "no/where.html"), "no/where.html: No such file"),
        (("--synthetic", "layers=2", *NODES), "experts, top_k missing"),
        (("--synthetic", "layers=2,experts=4,top_k=9", *NODES), "top_k=9"),
        (("--synthetic", "layers=2,experts=4,top_k=2,seed=-1", *NODES), "seed=-1"),
        (("--synthetic", "layers=2,depth=4", *NODES), "--synthetic 'depth=4': expected KEY=VALUE"),
        (("--synthetic", "layers=two", *NODES), "--synthetic 'layers=two': expected a number"),
    ],
)  # fmt: skip
def test_bad_input_is_named(place, arguments, says):
    bad_topology(place)
    assert says in refused(*arguments)


def test_neither_torch_nor_ray_is_loaded():
    program = (
        "import sys; from ray_ep.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "simulate", *SMALL, "--nodes", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"  # a busy machine is told that it is computing
