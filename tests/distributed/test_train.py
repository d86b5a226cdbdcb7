"""`ray-ep train` and `ray_ep.train` from end to end: what a run leaves, the same losses on any number of ranks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ray_ep.placement import Placement, Topology
from tests.browser import data_of
from tests.distributed.conftest import ROOT

KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second", "exchange_seconds",
    "expert_seconds", "bytes_intra_node", "bytes_inter_node", "balancedness", "world_size", "epoch",
    "placement_version",
}  # fmt: skip
FILES = {
    "config.yaml", "metrics.jsonl", "events.jsonl", "topology.json", "placements/0000.json", "statistics/routing.npz",
    "exchange.json", "report.html", "checkpoints/step-000020/manifest.json", "held_out/step-000020.npz",
}  # fmt: skip

IN_ONE_PROCESS = """
import json, sys, time
from pathlib import Path
import ray
ray.init(address=sys.argv[2], log_to_driver=False)
import ray_ep
from ray_ep.errors import CheckpointError

tiny = json.loads(sys.argv[1])
def train(*overrides):
    return ray_ep.train(ray_ep.load_config(None, [*tiny, "optim.steps=10", "cluster.cpus_per_rank=0.5", *overrides]))

kept = ["checkpoint.every=5", "checkpoint.keep=0", "optim.learning_rate=0.01", "optim.warmup_steps=2"]
status = {}
status["one"] = train("run_dir=one", "cluster.ranks=1", *kept[2:]).status
status["four"] = train("run_dir=four", "cluster.ranks=4", *kept).status
status["two"] = train("run_dir=two", "cluster.ranks=2", "resume=four/checkpoints/step-000005", *kept[2:]).status

file = next(Path("four/checkpoints/step-000010").glob("experts-L001-*"))
file.write_bytes(file.read_bytes()[:-100] + bytes(100))
try:
    train("run_dir=damaged", "cluster.ranks=1", "resume=four", *kept[2:], "optim.steps=12")
except CheckpointError as e:
    status["damaged"] = str(e)

@ray.remote
def alive():
    return 6 * 7

status["alive"] = ray.is_initialized() and ray.get(alive.remote())
limit = time.monotonic() + 10  # Ray counts a task's CPU as taken for a moment after its end
while ray.available_resources().get("CPU") != 4 and time.monotonic() < limit:
    time.sleep(0.1)
status["free"] = [ray.available_resources()["CPU"], ray.util.list_named_actors(all_namespaces=True)]
ray.shutdown()
print(json.dumps(status))
"""

RANKS_ALONE = """
import json, os, signal, sys
from pathlib import Path
import ray
given = {"GIVEN": "kept", "MALLOC_TRIM_THRESHOLD_": "7000000"}
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": given})
import ray_ep
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.actors.probe import measured_links
from ray_ep.errors import RankError

status = {}
three = ["cluster.ranks=3", "cluster.cpus_per_rank=0.5", "cluster.collective_timeout_s=5"]
cfg = ray_ep.load_config(None, three).cluster
ranks = Ranks(cfg, "three", False, lambda: False)
try:
    environ = Path(f"/proc/{ranks.where[0]['pid']}/environ").read_text().split(chr(0))
    own = ("GIVEN", "MALLOC", "TORCH_NCCL")
    status["environ"] = dict(line.split("=", 1) for line in environ if line.startswith(own))
    ranks.join(cfg.collective_timeout_s, ["gloo"])
    status["probe"] = measured_links(ranks, 1.0).to_json()
    os.kill(ranks.where[1]["pid"], signal.SIGSTOP)
    try:
        measured_links(ranks, 1.0)
    except RankError as e:
        status["stopped"] = e.rank, str(e)
    finally:
        os.kill(ranks.where[1]["pid"], signal.SIGCONT)
finally:
    ranks.kill()
print(json.dumps(status))
"""


@pytest.fixture(scope="module")
def run(shared, cluster):
    """(command, run directory) of twenty steps on two ranks."""
    steps = shared.tiny("optim.steps=20", "optim.learning_rate=0.01")
    command = shared.start("ray-ep", "train", "--json", *steps, RAY_ADDRESS=cluster.driver)
    assert command.wait(200) == 0, command.err
    (path,) = (shared.path / "runs").glob("[!.]*")
    return command, path


@pytest.fixture(scope="module")
def one_process(shared, cluster):
    """What a Python program that had its own Ray says after several runs in it."""
    command = shared.start("python", "-c", IN_ONE_PROCESS, json.dumps(shared.tiny()), cluster.driver)
    assert command.wait(200) == 0, command.err
    return json.loads(command.out.splitlines()[-1])


@pytest.fixture(scope="module")
def ranks_alone(shared, cluster):
    """What a program says that placed ranks without a model, of which one was stopped."""
    command = shared.start("python", "-c", RANKS_ALONE, cluster.driver)
    assert command.wait(200) == 0, command.err
    return json.loads(command.out.splitlines()[-1])


def test_a_run_leaves_its_files_and_no_process_of_its_command(run):
    command, path = run
    assert {f for f in FILES if not (path / f).is_file()} == set()
    assert not list(path.rglob("*.part"))
    assert command.left() == {}


def test_every_step_has_a_line_with_every_figure(run, lines):
    metrics = lines(run[1] / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 21))
    for m in metrics:
        assert KEYS - m.keys() == set()
        assert all(np.isfinite(m[k]) for k in KEYS)
        assert (m["tokens"], m["world_size"], m["epoch"], m["placement_version"]) == (256, 2, 0, 0)
        assert m["bytes_intra_node"] > 0
        assert m["bytes_inter_node"] == 0  # both ranks are on this machine
        assert 0.5 <= m["balancedness"] <= 1
        assert m["exchange_seconds"] + m["expert_seconds"] < m["step_seconds"]
        assert m["tokens_per_second"] == pytest.approx(256 / m["step_seconds"])


def test_how_tokens_travel_was_measured_at_the_start_and_is_told_everywhere(run, lines):
    path = run[1]
    choice = json.loads((path / "exchange.json").read_text())
    assert {t["kind"] for t in choice["timings"]} == {"flat", "all_gather"}  # both ranks are on one node
    assert choice["kind"] in ("flat", "all_gather")
    assert (choice["transport"], choice["tokens"], choice["backward"]) == ("gloo", 128, True)
    assert all(t["seconds"] > 0 for t in choice["timings"])
    (event,) = [e for e in lines(path / "events.jsonl") if e["kind"] == "exchange"]
    assert event["message"] == choice["words"]
    page = data_of((path / "report.html").read_text())["state"]["exchange"]
    assert page["words"] == choice["words"]
    assert [t["taken"] for t in page["timings"]].count(True) == 1


@pytest.mark.slow
def test_experts_that_the_fused_body_does_not_cover_train_and_tell_of_themselves_where_all_ranks_get_all(here, lines):
    """In a Ray of the run's own, of which nothing is left."""
    sizes = "hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, num_local_experts: 4, head_dim: 16"
    command = here.start(
        "ray-ep", "train", "--json", "model.type=gpt_oss", f"model.overrides={{{sizes}}}", "data.files=[text.txt]",
        "batch.sequences=4", "batch.length=16", "optim.steps=6", "eval.every=2", "exchange.kind=all_gather",
        "placement.imbalance=1.01", "run_dir=run",
    )  # fmt: skip
    assert command.wait(200) == 0, command.err
    assert command.left() == {}
    metrics = lines(here.path / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 7))
    for m in metrics:
        json.dumps(m, allow_nan=False)
        assert 0.5 <= m["balancedness"] <= 1
        assert m["imbalance_before"] == pytest.approx(1 / m["balancedness"])
        assert m["expert_seconds"] > 0
        assert m["phase_seconds"]["experts_backward"] > 0
        assert m["phase_seconds"]["exchange_backward"] > 0
    assert json.loads((here.path / "run" / "exchange.json").read_text())["kind"] == "all_gather"


@pytest.mark.slow
def test_a_lone_rank_has_nothing_to_choose(one_process, shared):
    choice = json.loads((shared.path / "one" / "exchange.json").read_text())
    assert (choice["kind"], choice["timings"]) == ("flat", [])


@pytest.mark.slow
def test_rank_processes_keep_their_memory_and_what_the_program_gave_its_ray(ranks_alone):
    assert ranks_alone["environ"] == {
        "GIVEN": "kept",
        "MALLOC_TRIM_THRESHOLD_": "7000000",  # the program's own word counts
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    }


def test_the_loss_falls(run, lines):
    metrics = lines(run[1] / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(np.log(256), rel=0.05)  # of bytes, by an untrained model
    assert np.mean([m["loss"] for m in metrics[-3:]]) < metrics[0]["loss"] - 1
    assert metrics[-1]["eval_loss"] < metrics[0]["loss"] - 1


def test_the_last_step_is_printed_as_one_json_line(run, lines):
    command, path = run
    (line,) = command.out.splitlines()
    said = json.loads(line)
    assert said["status"] == "done"
    assert (Path(path.parent.parent) / said["run"]).samefile(path)
    assert {k: said[k] for k in KEYS} == {k: lines(path / "metrics.jsonl")[-1][k] for k in KEYS}


def test_statistics_and_answers_to_held_out_text_count_every_token(run):
    statistics = np.load(run[1] / "statistics" / "routing.npz")
    load = next(v for k, v in statistics.items() if v.shape == (2, 8))
    assert load.sum(1).tolist() == [20 * 256 * 2] * 2  # steps x tokens x top_k in each layer
    answers = np.load(run[1] / "held_out" / "step-000020.npz")
    assert answers["experts"].shape == answers["ranks"].shape
    assert answers["experts"].shape[::2] == (2, 2)
    assert np.array_equal(answers["ranks"], answers["experts"] // 4)  # contiguous: four experts a rank


def test_every_run_measures_its_links_and_shows_them(run, lines):
    topology = Topology.from_json((run[1] / "topology.json").read_text())
    assert topology.measured[0, 1]
    assert topology.measured[1, 0]
    assert (topology.bandwidth[[0, 1], [1, 0]] > 1e6).all()
    page = data_of((run[1] / "report.html").read_text())["summary"]["links"]
    assert "rank 0 to 1, in node 0" in [row[0] for row in page["rows"]]


@pytest.mark.slow
def test_the_notebook_of_the_docs_runs_on_a_run_and_draws_it_without_fetching_anything(run, tmp_path):
    nbformat, nbclient, _ = map(pytest.importorskip, ("nbformat", "nbclient", "ipykernel"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(run[1])
    book = nbformat.read(ROOT / "docs" / "explore-a-run.ipynb", as_version=4)
    assert not any(cell.outputs or cell.execution_count for cell in book.cells if cell.cell_type == "code")
    nbclient.NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.id: cell.get("outputs", []) for cell in book.cells}
    said = {name: "".join(o.text for o in its if o.output_type == "stream") for name, its in outputs.items()}
    assert {o.name for its in outputs.values() for o in its if o.output_type == "stream"} == {"stdout"}
    assert "runs/NAME: 2 MoE layers x 8 experts on 2 ranks, placement 0\nstate: stopped" in said["load"]
    assert "on ranks [0]: placement 0, after step 0:" in said["placement"] or "on ranks [1]" in said["placement"]
    assert "\n0 experts sit elsewhere than at the beginning:" in said["placement"]
    assert re.findall(r"^ *(\S+): expert layers", said["plan"], re.M) == [
        "current", "contiguous", "random", "load-only", "plan",
    ]  # fmt: skip
    assert said["plan"].splitlines()[-1].startswith(("stay: ", "move "))
    for name in ("slots", "own", "cluster"):
        assert re.search(r"expert layers +\d+\.\d{3} ms a step", said[name]), name
    assert Placement.load(tmp_path / "mine.json").version == 1
    drawn = [name for name, its in outputs.items() if any("application/javascript" in o.get("data", {}) for o in its)]
    assert drawn == ["load", "load-of-experts", "placement", "coactivation"]  # the first one is Bokeh itself
    assert "cdn.bokeh.org" not in json.dumps([outputs[name] for name in drawn[1:]])


@pytest.mark.slow
def test_a_probe_without_a_model_measures_every_link(ranks_alone):
    topology = Topology.from_json(ranks_alone["probe"])
    off = ~np.eye(3, dtype=bool)
    assert topology.measured[off].all()
    assert (topology.bandwidth[off] > 1e6).all()
    assert topology.node_of.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_links_are_probed_is_named(ranks_alone):
    rank, words = ranks_alone["stopped"]
    assert rank == 1
    assert re.match(r"rank 1 on \S+ \(process \d+\) has not answered for", words), words


def losses(shared, lines, name):
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in lines(shared.path / name / "metrics.jsonl")}


@pytest.mark.slow
def test_losses_and_norms_are_equal_on_one_and_four_ranks(one_process, shared, lines):
    one, four = (losses(shared, lines, n) for n in ("one", "four"))
    assert list(one) == list(four) == list(range(1, 11))
    for step in one:
        assert four[step] == pytest.approx(one[step], rel=1e-4), step


@pytest.mark.slow
def test_a_run_saved_on_four_ranks_continues_the_same_curve_on_two(one_process, shared, lines):
    one, two = (losses(shared, lines, n) for n in ("one", "two"))
    assert list(two) == [6, 7, 8, 9, 10]
    for step in two:
        assert two[step] == pytest.approx(one[step], rel=1e-4), step
    assert {m["world_size"] for m in lines(shared.path / "two" / "metrics.jsonl")} == {2}


@pytest.mark.slow
def test_one_rank_sends_no_bytes_to_itself(one_process, shared, lines):
    one = lines(shared.path / "one" / "metrics.jsonl")
    assert {m["bytes_intra_node"] + m["bytes_inter_node"] for m in one} == {0}


@pytest.mark.slow
def test_a_damaged_tensor_is_named_and_no_run_is_made(one_process, shared):
    assert "four/checkpoints/step-000010" in one_process["damaged"]
    assert re.search(r"experts-L001-r00\d\.safetensors", one_process["damaged"])
    assert not (shared.path / "damaged").exists()


@pytest.mark.slow
def test_a_program_keeps_the_ray_it_had_started_with_all_its_cpus_and_no_ranks(one_process):
    assert one_process["alive"] == 42
    assert one_process["free"] == [4.0, []]


@pytest.mark.slow
def test_the_probe_command_joins_a_cluster_and_writes_what_it_measured(cluster, shared):
    command = shared.start(
        "ray-ep", "probe", "--budget=1", "--out=links.json", "cluster.cpus_per_rank=0.5",
        RAY_ADDRESS=cluster.driver,
    )  # fmt: skip
    assert command.wait(200) == 0, command.err
    assert command.out.startswith("2 ranks on 1 node(s)\nlink")
    assert re.search(r"^rank 1 to 0, in node 0 +1 +[\d.]+ [kMG]B/s", command.out, re.M)
    assert Topology.from_json((shared.path / "links.json").read_text()).measured[1, 0]
    assert command.left() == {}


@pytest.fixture(scope="module")
def again(cluster, run, shared):
    """(command, metrics before) of a second start that goes on with the finished run, now with a forced router."""
    before = (run[1] / "metrics.jsonl").read_text()
    command = shared.train(
        "optim.steps=23",
        f"run_dir={run[1]}",
        "resume=auto",
        "router.force=balanced",
        RAY_ADDRESS=cluster.driver,
    )
    assert command.wait(200) == 0, command.err
    return command, before


@pytest.mark.slow
def test_a_second_start_goes_on_at_the_next_step_in_the_same_directory(again, run, shared, lines):
    before, path = again[1], run[1]
    assert [p.name for p in (shared.path / "runs").glob("[!.]*")] == [path.name]
    assert (path / "metrics.jsonl").read_text().startswith(before)
    assert [m["step"] for m in lines(path / "metrics.jsonl")] == list(range(1, 24))
    load = next(v for v in np.load(path / "statistics" / "routing.npz").values() if v.shape == (2, 8))
    assert load.sum(1).tolist() == [23 * 256 * 2] * 2  # those before the resume included


@pytest.mark.slow
def test_a_forced_router_is_marked_on_every_line_and_balances(again, run, lines):
    said = again[0].err.splitlines()
    assert len(said) >= 3
    assert [x for x in said if not x.startswith("[router.force=balanced] ")] == []
    assert {m["balancedness"] for m in lines(run[1] / "metrics.jsonl")[-3:]} == {1.0}


def submit(here, cluster, *overrides):
    """`ray job submit` of a run in a directory of its own; streams until the job ends."""
    work = here.path / "work"
    work.mkdir()
    (here.path / "text.txt").rename(work / "text.txt")
    arguments = ["--working-dir", str(work), "--", "ray-ep", "train", *here.tiny(*overrides)]
    return here.start("ray", "job", "submit", "--address", cluster.job, *arguments)


@pytest.mark.slow
def test_a_submitted_job_streams_its_log_and_ends_well(cluster, here, lines):
    command = submit(here, cluster, "optim.steps=5", f"run_dir={here.path / 'run'}")
    assert command.wait(200) == 0, command.out + command.err
    log = command.out + command.err
    assert re.search(r"^start qwen3_moe, .* on 2 ranks", log, re.M)
    assert re.search(r"^step=5/5 loss=", log, re.M)
    assert f"done: {here.path / 'run'}/report.html" in log
    assert "succeeded" in log
    assert [m["step"] for m in lines(here.path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_submitted_job_with_bad_input_fails_with_its_message(cluster, here):
    command = submit(here, cluster, "optim.stpes=5")
    assert command.wait(200) != 0
    log = command.out + command.err
    assert "did you mean 'optim.steps'" in log
    assert "failed" in log
