"""Ranks on shaped links: what the probe finds, a link that slows under a run, and placements compared by real steps.

One run of `ray-ep train` records the routing; turns.py then trains under each placement on each of two clusters.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT, Popen

import pytest
from scipy.stats import spearmanr

from .conftest import command, needs_root, netlab
from .runs import FOUR, RAY_EP, RUN, TWO, lines
from .skewed import write

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.lab]

TURNS = Path(__file__).with_name("turns.py")
BEFORE, AFTER = 3, 2
"""Steps of the run before and after a link slows."""


@pytest.fixture(scope="module")
def four(make_lab):
    """A lab of four hosts of one rank, up; (path, Lab)."""
    made = make_lab(4, FOUR)
    netlab("up", made[0])
    yield made
    netlab("down", made[0])


@pytest.fixture(scope="module")
def run(four, tmp_path_factory):
    """The directory of a run on `four`, contiguous, under which the links between h0 and h2 slow down and recover."""
    path, _ = four
    folder = tmp_path_factory.mktemp("run")
    options = [*write(folder), *RUN.split(), f"run_dir={folder / 'run'}", f"optim.steps={BEFORE + AFTER + 1}"]
    metrics = folder / "run" / "metrics.jsonl"
    with Popen(command("exec", path, "--", *RAY_EP, "train", *options), stdout=PIPE, stderr=STDOUT, text=True) as train:
        while len(lines(metrics)) < BEFORE and train.poll() is None:
            time.sleep(0.02)
        netlab("shape", path, "h0", "h2", "10mbit")
        words = train.communicate(timeout=150)[0]
    assert train.returncode == 0, words[-2000:]
    netlab("shape", path, "h0", "h2", FOUR["default"])
    return folder / "run"


@pytest.fixture(scope="module", params=["flat", "two_level"])
def compared(request, run, make_lab):
    """(lab, what turns.py found): four hosts of one rank, flat; and two hosts of two ranks, once to each node."""
    path, lab = request.getfixturevalue("four") if request.param == "flat" else make_lab(2, TWO, ranks=2)
    out = run.parent / f"{request.param}.json"
    verb, fewer = ("exec", []) if request.param == "flat" else ("run", ["batch.sequences=24"])
    options = [run, out, "1,3", f"exchange.kind={request.param}", *fewer]
    print(netlab(verb, path, "--", sys.executable, TURNS, *options)[0])
    return lab, json.loads(out.read_text())


def test_a_link_that_slows_under_a_run_slows_its_steps_from_then_on(run):
    exchange = [line["exchange_seconds"] for line in lines(run / "metrics.jsonl")]
    slowed = exchange[BEFORE + 1 :]  # within the step between, it slowed
    assert len(slowed) == AFTER
    assert min(slowed) > 1.5 * median(exchange[:BEFORE])


def test_the_probe_finds_every_bandwidth(compared):
    lab, found = compared
    host = {lab.address(h.name): h.name for h in lab.hosts}
    of = [host[address] for address in found["hosts"]]
    assert sorted(of) == sorted(h.name for h in lab.hosts for _ in range(h.ranks))
    links = [(a, b) for a in range(len(of)) for b in range(len(of)) if of[a] != of[b]]
    wanted = {(a, b): pytest.approx(lab.rates[of[a], of[b]], rel=0.2) for a, b in links}
    assert {(a, b): 8 * found["topology"]["bandwidth"][a][b] for a, b in links} == wanted


def test_the_plan_outruns_contiguous_and_a_balancer_of_load_alone(compared):
    speed = {name: f["tokens_per_second"] for name, f in compared[1]["placements"].items()}
    planned = max(speed["plan, node"], speed["plan, rank"])
    assert planned > 1.5 * speed["contiguous"]
    assert planned > 1.2 * speed["load-only"]


def test_losses_do_not_depend_on_the_placement(compared):
    losses = {name: f["losses"] for name, f in compared[1]["placements"].items()}
    first = losses["contiguous"][-1]
    assert first[-1] < first[0] - 0.3  # it learns
    for name, turns in losses.items():
        for got in turns:
            assert got == pytest.approx(first[: len(got)], rel=2e-6), name


def test_predicted_step_times_order_placements_as_the_measured_ones_do(compared):
    found = compared[1]["placements"].values()
    assert len(found) >= 8
    pairs = [(f["predicted_seconds"], f["step_seconds"]) for f in found]
    assert spearmanr(*zip(*pairs, strict=True)).statistic >= 0.9
