"""What a run exports, as a real Prometheus sees it: every query of every dashboard, names, alert rules, its end."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ray_ep.observe.grafana import RULES
from ray_ep.observe.metrics.table import METRICS, Kind
from tests.distributed.conftest import free_ports
from tests.faults import Faults

installed = shutil.which("prometheus") and shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    not installed, reason="no Prometheus here: apt-get install prometheus (Debian, Ubuntu) brings it and promtool"
)
REPORT_MS = 2000
"""How often Ray's processes report to the node's agent; 10 s by default."""
BUSY = [
    # Experts take a good part of a step, and two of them most of the tokens, so that moving one pays.
    "model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 512, num_hidden_layers: 2, "
    "num_experts: 8, head_dim: 8}",
    "data.files=[text.txt]", "batch.sequences=8", "batch.length=128", "cluster.ranks=2", "exchange.kind=flat",
    "router.force=skewed", "balance.in_step=off", "placement.every=2", "eval.every=10", "checkpoint.every=10",
    "snapshot.every=3", "optim.steps=1000000",
]  # fmt: skip


class Prometheus:
    """One that scrapes a session of Ray, as `ray-ep dashboards install` left its configuration, but each second."""

    def __init__(self, place, session):
        config = (session / "metrics" / "prometheus" / "prometheus.yml").read_text().replace(" 10s", " 1s")
        (place.path / "prometheus.yml").write_text(config)
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        self.command = place.start(
            shutil.which("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{port}",
        )  # fmt: skip

    def ask(self, path, **arguments):
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, text):
        return self.ask("query", query=text)["result"]

    def value(self, text):
        """Of a query with one series, or of none: 0."""
        found = self.query(text)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0


def panels(folder):
    """{(file, title of the panel, query)} of all queries that ask for metrics of ours."""
    return {
        (path.name, panel["title"], target["expr"])
        for path in folder.glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
        if "ray_ep_" in target["expr"]
    }


def typed(text):
    """A query as Grafana sends it with every session and run chosen."""
    for variable, value in {"__rate_interval": "15s", "SessionName": ".+", "run": ".+"}.items():
        text = text.replace(f"${variable}", value)
    return text


@pytest.fixture(scope="module")
def session(shared):
    """A head with its dashboard; its address, and the directory of its session, our dashboards in it."""
    system = {"metrics_report_interval_ms": REPORT_MS}
    head = {"num_cpus": 2, "include_dashboard": True, "_system_config": system}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        path = Path(made.head_node.get_session_dir_path())
        limit = time.monotonic() + 60
        while not (path / "metrics" / "prometheus" / "prometheus.yml").exists():
            assert time.monotonic() < limit, "Ray's dashboard has written nothing for Prometheus"
            time.sleep(0.2)
        command = shared.ray_ep("dashboards", "install", "--session", str(path))
        assert command.wait(200) == 0, command.err
        yield made.address, path
    finally:
        made.shutdown()


class Watched:
    """A run that moves experts, loses a rank and goes on, and the Prometheus that scrapes it.

    Attributes:
        empty: queries of panels to which no data has come yet, by dashboard, title and text.
        types: of all metrics that were there, by name.
    """

    def __init__(self, shared, lines, session):
        address, self.session = session
        self.path, self.lines = shared.path / "watched", lines
        self.prometheus = Prometheus(shared, self.session)
        self.empty, self.types = panels(self.session / "metrics" / "grafana" / "dashboards"), {}
        faults = Faults(shared.path / "faults.jsonl")
        self.command = shared.ray_ep("train", *BUSY, "run_dir=watched", faults=faults, RAY_ADDRESS=address)
        self.command.until(lambda: any("gain_measured" in e["fields"] for e in self.events("rebalance")), 200, "a move")
        # The links of a single rank that is left, and of one that came since, are not known.
        self.fill(lambda: all("ray_ep_recovery_seconds" in text for _, _, text in self.empty))
        os.kill(faults.pid(1), signal.SIGKILL)
        self.command.until(lambda: self.events("recovered"), 200, "the recovery")
        self.fill(lambda: not self.empty)

    def fill(self, enough):
        """Ask what is empty again and again, until that is enough or too long."""
        limit = time.monotonic() + 60
        while not enough() and time.monotonic() < limit:
            for key in list(self.empty):
                if any(series["value"][1] != "NaN" for series in self.prometheus.query(typed(key[2]))):
                    self.empty.discard(key)
            time.sleep(0.5)
        told = self.prometheus.ask("metadata")
        self.types |= {name: told[name][0]["type"] for name in told}

    def metrics(self):
        return self.lines(self.path / "metrics.jsonl")

    def events(self, kind):
        return [e for e in self.lines(self.path / "events.jsonl") if e["kind"] == kind]

    def until(self, condition, what):
        return self.command.until(condition, 120, what)


@pytest.fixture(scope="module")
def run(shared, lines, session):
    return Watched(shared, lines, session)


@pytest.mark.slow
def test_every_query_of_every_dashboard_returns_data_of_the_run(run):
    asked = panels(run.session / "metrics" / "grafana" / "dashboards")
    assert len(asked) > 70
    assert len({name for name, _, _ in asked}) == 5  # ours, and Ray's with our row
    assert sorted(run.empty) == []


@pytest.mark.slow
def test_what_a_run_exports_is_what_the_table_says(run):
    names = set(run.prometheus.ask("label/__name__/values"))
    ours = {name for name in names if name.startswith("ray_ep_")}
    want = {m.exported for m in METRICS.values() if m.kind is not Kind.HISTOGRAM}
    want |= {f"ray_ep_step_seconds_{part}" for part in ("bucket", "count", "sum")}
    assert ours == want
    for metric in METRICS.values():
        family = metric.exported
        told = run.types.get(family) or run.types[family.removesuffix("_total")]  # as the format that was agreed has it
        assert told == metric.kind.value, family
        for series in run.prometheus.ask("series", **{"match[]": f"{{__name__=~'{family}(_bucket)?'}}"}):
            assert series["run"] == "watched"
            assert set(metric.tags) <= set(series), series


@pytest.mark.slow
def test_figures_are_those_of_the_run_directory(run):
    def agree():
        step = run.prometheus.value("ray_ep_step")
        line = next((m for m in run.metrics() if m["step"] == step), None)
        return line and line["loss"] == pytest.approx(run.prometheus.value("ray_ep_loss"))

    run.until(agree, "the loss of a step")
    (recovered,) = run.events("recovered")
    assert run.prometheus.value("ray_ep_recoveries_total") == 1
    assert run.prometheus.value("ray_ep_repeated_steps_total") == recovered["fields"]["repeated"]
    for clock, seconds in recovered["fields"]["seconds"].items():
        assert run.prometheus.value(f'ray_ep_recovery_seconds{{clock="{clock}"}}') == pytest.approx(seconds)


@pytest.mark.slow
def test_a_recovery_raises_its_alert_and_nothing_that_is_not_so_raises_one(run):
    def firing():
        return {a["labels"]["alertname"] for a in run.prometheus.ask("alerts")["alerts"] if a["state"] == "firing"}

    run.until(lambda: "RayEpRecovery" in firing(), "the alert")
    assert firing() <= {"RayEpRecovery", "RayEpRoutingCollapse"}  # its router is forced to be skewed


@pytest.mark.slow
def test_an_ended_run_leaves_its_whole_counts(run):
    os.kill(run.command.process.pid, signal.SIGINT)
    assert run.command.wait(200) == 130, run.command.err
    steps = len(run.metrics())
    limit = time.monotonic() + 120
    while run.prometheus.value("ray_ep_steps_total") < steps:
        assert time.monotonic() < limit, (run.prometheus.value("ray_ep_steps_total"), steps)
        time.sleep(0.5)
    assert run.prometheus.value("ray_ep_steps_total") == steps
    assert run.prometheus.value("sum(ray_ep_checkpoints_total)") == len(run.events("checkpoint"))


def promtool(*arguments):
    return subprocess.run(["promtool", *arguments], cwd=RULES.parent, capture_output=True, text=True)


def test_alert_rules_are_valid_and_come_when_they_should():
    for arguments in (["check", "rules", RULES.name], ["test", "rules", "alerts_test.yaml"]):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_in_which_it_comes():
    tested = (RULES.parent / "alerts_test.yaml").read_text()
    for line in RULES.read_text().splitlines():
        if "- alert: " in line:
            name = line.partition("- alert: ")[2]
            assert f"alertname: {name}\n        exp_alerts:" in tested, name
