"""Experts that move while `ray-ep train` runs: the same losses, reasons in words, on demand, refusals harmless."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import ray_ep
from tests.browser import data_of

PACKAGE = str(Path(ray_ep.__file__).parent.parent)
COMPUTE = (
    "model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 512, num_hidden_layers: 2, "
    "num_experts: 8, head_dim: 8}"
)  # experts take a good part of a step, so that their places matter on links as fast as this machine's

RUNS = """
import json, sys, threading, time
from datetime import datetime
from pathlib import Path
import ray
ray.init(address=sys.argv[2], log_to_driver=False)
import ray_ep
from ray_ep.cli import main
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.loop import Driver
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.requests import Requests
from ray_ep.driver.start import check_run
from ray_ep.placement.planner.verdict import Verdict
from ray_ep.placement import contiguous
from ray_ep.placement.planner import plan as planner

planner.warm()  # so that the first decision does not wait for a compiler
same = json.loads(sys.argv[1])
def config(*overrides):
    return ray_ep.load_config(None, [*same, *overrides])

def ask():
    while Path("moving/metrics.jsonl").read_text().count("\\n") <= 24:
        time.sleep(0.02)
    main(["rebalance", "moving"], standalone_mode=False)

soon = "placement.alert_s=1e-6"  # no decision is as fast
ray_ep.train(config("run_dir=moving", "placement.every=2", soon, "tracking.to=[otel]"))
threading.Thread(target=ask).start()
ray_ep.train(config("run_dir=moving", "placement.every=0", "resume=auto", "optim.steps=40"))

cfg = config("run_dir=static", "placement.every=0")
plan = check_run(cfg, datetime.now())
ranks = Ranks(cfg.cluster, "static", False, Interrupt())
try:
    with Publisher([plan.run]) as publisher:
        driver = Driver(cfg, plan, ranks, publisher, Requests())
        driver.form()
        driver.step_with_recovery()
        driver.mover.move(Verdict(contiguous(2, 8, 3), "move to three ranks", 1.0), 1)
        driver.run()
finally:
    ranks.kill()
ray.shutdown()
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(shared, cluster):
    """The directory with a run whose experts move, then are asked to in its continuation, and one whose stay."""
    same = [
        COMPUTE, "data.files=[text.txt]", "batch.sequences=8", "batch.length=128", "optim.steps=24",
        "cluster.cpus_per_rank=0.5", "router.force=skewed", "exchange.kind=flat", "balance.in_step=off",
        "eval.every=0",
    ]  # fmt: skip
    command = shared.start("python", "-c", RUNS, json.dumps(same), cluster.driver, PYTHONPATH=PACKAGE)
    assert command.wait(220) == 0, command.err
    return shared.path


@pytest.fixture
def said(runs, lines):
    """Messages of a run's events of one kind."""
    return lambda name, kind="rebalance": [
        e["message"] for e in lines(runs / name / "events.jsonl") if e["kind"] == kind
    ]


def test_each_move_is_a_span_with_how_many_experts_moved_linked_to_its_decision_and_to_what_it_brought(runs, lines):
    trees = [line["resourceSpans"][0]["scopeSpans"][0]["spans"] for line in lines(runs / "moving" / "spans.jsonl")]
    named = {name: [t[0] for t in trees if t[0]["name"] == name] for name in ("step", "rebalance", "migration")}
    measured = [t[0] for t in trees if t[0]["name"] == "rebalance.measured"]

    def attribute(span, name):
        return next(next(iter(a["value"].values())) for a in span["attributes"] if a["key"] == f"ray_ep.{name}")

    def linked(span):
        return {k["spanId"] for k in span["links"]}

    assert named["migration"]
    assert measured
    for move in named["migration"]:
        assert int(attribute(move, "moved_experts")) > 0
        (decision,) = [d for d in named["rebalance"] if d["spanId"] in linked(move)]
        assert attribute(decision, "moves") is True
        assert decision["endTimeUnixNano"] <= move["startTimeUnixNano"] < move["endTimeUnixNano"]
        steps = [s for s in named["step"] if s["endTimeUnixNano"] <= move["startTimeUnixNano"]]
        assert int(attribute(steps[-1], "step")) == int(attribute(move, "step"))
    assert all(linked(m) & {move["spanId"] for move in named["migration"]} for m in measured)


def test_experts_move_where_it_pays_and_what_it_brought_is_measured(runs, said, lines):
    first = next(m for m in said("moving") if not m.startswith("stay"))
    assert first.startswith("move ")
    assert "experts: predicted step " in first
    assert "(asked after step " in first
    assert any(m.startswith("measured after the move of step ") for m in said("moving"))
    metrics = lines(runs / "moving" / "metrics.jsonl")
    versions = [m["placement_version"] for m in metrics]
    assert versions[0] == 0
    assert versions[-1] >= 1
    changes = [a for a, b in pairwise(metrics) if a["placement_version"] < b["placement_version"]]
    assert all(0 < m["migration_seconds"] <= m["rebalance_seconds"] for m in changes)
    assert all(m["migration_seconds"] == 0 for m in metrics if m not in changes)
    assert metrics[0]["balancedness"] == pytest.approx(2 / 3)
    assert metrics[-1]["balancedness"] > 0.9
    assert sorted(p.name for p in (runs / "moving" / "placements").iterdir()) == [
        f"{v:04d}.json" for v in range(versions[-1] + 1)
    ]


def test_losses_are_those_of_a_run_whose_experts_stay(runs, lines):
    static, moving = (lines(runs / name / "metrics.jsonl")[:24] for name in ("static", "moving"))
    assert {m["placement_version"] for m in static} == {0}
    for a, b in zip(static, moving, strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=2e-4), a["step"]


def test_a_run_that_goes_on_keeps_its_placement(runs, lines):
    metrics = lines(runs / "moving" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 41))
    assert metrics[24]["placement_version"] == metrics[23]["placement_version"] > 0
    assert metrics[-1]["balancedness"] > 0.9


def test_a_decision_that_is_late_raises_an_alert_and_the_run_goes_on(said, lines, runs):
    alerts = said("moving", "rebalance-alert")
    assert alerts
    assert all(re.match(r"no progress for .* s \(placement.alert_s=1e-06\): no decision", a) for a in alerts)
    assert said("static", "rebalance-alert") == []
    assert lines(runs / "moving" / "metrics.jsonl")[23]["placement_version"] > 0  # and was moved by that decision


def test_the_report_shows_why(runs, said):
    page = data_of((runs / "moving" / "report.html").read_text())["state"]["placement"]
    version = next(v for v in page["versions"] if v["cause"] == "rebalance")
    assert "predicted step" in version["words"]
    assert version["gain_predicted"] > 0
    assert version["gain_measured"] is not None


def test_a_run_is_asked_by_the_command_and_answers(runs, said):
    assert not (runs / "moving" / "rebalance").exists()
    (answer,) = [m for m in said("moving") if ": on demand)" in m]
    assert answer.startswith(("move ", "stay: "))


def test_a_placement_that_the_ranks_refuse_changes_nothing(runs, said, lines):
    (message,) = said("static")
    assert message.startswith("the move failed: placement is for 2 layers x 8 experts on 3 ranks")
    metrics = lines(runs / "static" / "metrics.jsonl")
    assert [m["placement_version"] for m in metrics] == [0] * 24
    assert np.isfinite([m["loss"] for m in metrics]).all()
