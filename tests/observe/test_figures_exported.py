"""What a run exports: which figures change with a step, an event, a file of the run directory; when they are sent."""

import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from ray_ep.config import load_config
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from ray_ep.observe.metrics import exporter, listener
from ray_ep.observe.metrics.figures import Taken
from ray_ep.observe.metrics.listener import Metrics
from ray_ep.observe.metrics.reading import Reading
from ray_ep.observe.metrics.table import METRICS, Kind
from ray_ep.placement import Placement, Topology
from tests.records import record

ROOT = Path(__file__).parents[2]
START = Event("start", "a model", {"model": "mixtral", "layers": 1, "experts": 4, "ranks": 2})


class Run:
    """A run directory and what is read of it."""

    def __init__(self, path):
        (path / "placements").mkdir()
        self.path, self.now = path, 100.0
        self.reading = Reading(path, lambda: self.now)

    def place(self, version, slots, experts=4):
        (self.path / "placements" / f"{version:04d}.json").write_text(Placement(slots, experts, version).to_json())

    def link(self, slowest):
        """Two nodes of two ranks; the link from rank 0 to rank 2 has so many bytes/s."""
        bandwidth = np.where(np.array([0, 0, 1, 1])[:, None] == [0, 0, 1, 1], 8e9, 1e9)
        bandwidth[0, 2] = slowest
        topology = Topology(bandwidth, np.zeros((4, 4)), [0, 0, 1, 1])
        (self.path / "topology.json").write_text(topology.to_json())

    def hear(self, *said):
        for it in said:
            getattr(self.reading, "event" if isinstance(it, Event) else "step")(it)

    def value(self, name, *tags):
        """Of a series now; None: it is not there."""
        taken = self.reading.take()
        return {**taken.gauges, **taken.totals}.get((name, tuple(map(str, tags))))

    def values(self, name):
        """{tags: value} of all series of a metric."""
        taken = self.reading.take()
        return {key[1]: v for key, v in {**taken.gauges, **taken.totals}.items() if key[0] == name}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_counters_are_there_at_zero_before_anything_has_happened(run):
    assert run.value("ep_recoveries_total") == 0
    assert run.values("ep_lost_ranks_total") == {("true",): 0, ("false",): 0}
    assert len(run.values("ep_rebalance_decisions_total")) == 4
    assert run.values("ep_rank_pairs_total") == {}  # its tags are the run's


def test_a_step_counts_and_tells_what_it_was(run):
    made = record(7, loss=1.5, grad_norm=0.25, tokens=64, bytes_inter_node=30, peak_mib=2, placement_version=3, epoch=1)
    run.hear(made, made)
    assert (run.value("ep_steps_total"), run.value("ep_tokens_total")) == (2, 128)
    assert run.values("ep_exchange_bytes_total") == {("intra_node",): 0, ("inter_node",): 60}
    told = {"ep_step": 7, "ep_loss": 1.5, "ep_grad_norm": 0.25, "ep_peak_memory_bytes": 2 << 20, "ep_epoch": 1}
    assert {name: run.value(name) for name in told} == told
    assert run.value("ep_last_step_timestamp_seconds") == 100.0


def test_the_first_step_after_ranks_have_formed_is_left_out_of_times(run):
    def took(seconds, epoch):
        phases = {"forward": seconds / 2}
        return record(1, step_seconds=seconds, tokens_per_second=1 / seconds, epoch=epoch, phase_seconds=phases)

    run.hear(took(9.0, 0))
    assert run.value("ep_tokens_per_second") is None
    run.hear(took(1.0, 0), took(2.0, 0), took(50.0, 1), took(4.0, 1))
    assert run.reading.take().observed == [("ep_step_seconds", s) for s in (1.0, 2.0, 4.0)]
    assert run.value("ep_stepping_seconds_total") == 7.0
    assert run.value("ep_step_phase_seconds", "forward") == 2.0
    assert run.value("ep_steps_total") == 5


def test_hottest_experts_of_a_layer_are_told_by_place_with_their_numbers(run):
    run.hear(record(1, load=np.array([[1, 6, 3, 2], [4, 0, 0, 0]])))
    assert run.values("ep_hottest_expert_id")["0", "1"] == 1
    assert [run.value("ep_hottest_expert_load", 0, place) for place in (1, 2, 3)] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert (run.value("ep_hottest_expert_id", 1, 1), run.value("ep_hottest_expert_load", 1, 1)) == (0, 4.0)
    assert run.value("ep_hottest_expert_load", 0, 4) is None


def test_balance_of_a_layer_is_the_mean_over_the_largest_load_of_a_rank(run):
    run.hear(record(1, rank_load=np.array([[1, 3], [0, 0]])))
    assert run.values("ep_balancedness") == {("0",): pytest.approx(2 / 3), ("1",): 1.0}


def test_loads_of_ranks_add_up_from_rank_to_rank_also_when_there_are_more_or_fewer(run):
    run.hear(record(1, rank_load=np.array([[1, 3], [2, 2]])))
    assert run.values("ep_rank_pairs_total") == {("0",): 3, ("1",): 8}
    run.hear(record(2, rank_load=np.array([[1, 1, 5]])))
    assert run.values("ep_rank_pairs_total") == {("0",): 4, ("1",): 10, ("2",): 15}
    run.hear(record(3, rank_load=np.array([[10]])))
    assert run.values("ep_rank_pairs_total") == {("0",): 14, ("1",): 20, ("2",): 25}


def test_experts_that_came_to_another_rank_are_counted_once_while_ranks_are_the_same(run):
    run.place(0, [[[0, 1], [2, 3]]])
    run.place(1, [[[2, 1], [0, 3]]])
    run.place(2, [[[0], [1], [2], [3]]])
    for version in (0, 0, 1, 1, 2):
        run.hear(record(1, placement_version=version))
    assert run.value("ep_migrated_experts_total") == 2
    run.hear(record(1, placement_version=9))  # whose file is not there
    assert run.value("ep_placement_version") == 9


def test_links_are_told_as_few_figures_and_one_that_slows_is_counted(run):
    run.link(1e9)
    run.reading.start(START)
    run.hear(record(1))
    assert run.value("ep_link_bandwidth_bytes_per_second", "intra_node", "median") == 8e9
    assert (run.value("ep_slowed_links"), run.value("ep_link_slowdown")) == (0, 1)
    run.link(1e8)
    run.hear(record(2))
    assert run.value("ep_slowed_links") == 0  # nobody has said that they were measured
    run.hear(Event("topology", "slower"), record(3))
    assert run.value("ep_link_bandwidth_bytes_per_second", "inter_node", "min") == 1e8
    assert run.values("ep_slowest_link_rank") | {("1", "source"): 0, ("1", "destination"): 2} == run.values(
        "ep_slowest_link_rank"
    )
    assert (run.value("ep_slowed_links"), run.value("ep_link_slowdown")) == (1, pytest.approx(10))
    run.hear(record(4, epoch=1))  # other ranks: what is measured first counts
    assert run.value("ep_slowed_links") == 0


def test_links_that_were_not_measured_are_not_told(run):
    (run.path / "topology.json").write_text(Topology.of_nodes([0, 1]).to_json())
    run.reading.start(START)
    assert run.values("ep_link_bandwidth_bytes_per_second") == run.values("ep_slowed_links") == {}


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"moves": True, "placement_version": 4, "step_predicted": 0.5}, "move"),
        ({"moves": False, "placement_version": 4, "step_predicted": 0.5}, "advise"),
        ({"moves": False, "placement_version": None, "step_predicted": 0.5}, "stay"),
        ({"asked_after": 3}, "failed"),
    ],
)
def test_a_decision_is_counted_by_its_outcome_and_ends_a_stall(run, fields, outcome):
    run.hear(Event("rebalance-alert", "no progress"))
    assert run.value("ep_rebalance_stalled") == 1
    run.hear(Event("rebalance", "words", fields, step=12))
    assert run.values("ep_rebalance_decisions_total")[(outcome,)] == 1
    assert sum(run.values("ep_rebalance_decisions_total").values()) == 1
    assert (run.value("ep_rebalance_stalled"), run.value("ep_last_decision_step")) == (0, 12)
    assert run.value("ep_predicted_step_seconds") == fields.get("step_predicted")


def test_what_a_move_gained_stands_beside_what_was_predicted_and_is_no_decision(run):
    figures = {"gain_predicted": 0.02, "gain_measured": -0.01, "move_predicted": 1.0, "move_seconds": 2.0}
    run.hear(Event("rebalance", "measured", {"moved_after": 5, **figures}))
    run.hear(Event("rebalance", "not measured", {"moved_after": 9, "gain_predicted": 0.5}))
    assert run.values("ep_move_gain_seconds") == {("predicted",): 0.02, ("measured",): -0.01}
    assert run.values("ep_migration_seconds") == {("predicted",): 1.0, ("measured",): 2.0}
    assert sum(run.values("ep_rebalance_decisions_total").values()) == 0


def test_a_recovery_tells_its_clocks_and_what_was_lost(run):
    seconds = {"detect": 0.25, "decide": 0.25, "regroup": 0.5, "restore": 1.0, "first_step": 4.0}
    run.hear(Event("recovered", "w", {"lost": ["rank-1"], "planned": False, "repeated": 7, "seconds": seconds}))
    assert (run.value("ep_recoveries_total"), run.value("ep_repeated_steps_total")) == (1, 7)
    assert run.values("ep_lost_ranks_total") == {("true",): 0, ("false",): 1}
    assert run.values("ep_recovery_seconds") == {(clock,): s for clock, s in seconds.items()}
    assert run.value("ep_standing_seconds_total", "recovery") == 2.0  # the first step is a step


def test_ranks_are_told_by_what_they_are_at(run):
    run.reading.start(START)
    assert run.values("ep_ranks") | {("active",): 2, ("desired",): 2, ("waiting",): 0} == run.values("ep_ranks")
    figures = {"desired": 4, "active": 2, "allocated": 3, "waiting": 1, "joining": 1, "ready": 0}
    run.hear(Event("elastic", "asks for 2 more", figures))
    assert run.values("ep_ranks") == {(state,): n for state, n in figures.items()}
    run.hear(
        Event("elastic", "2 -> 3", {"come": ["rank-2", "rank-3"], "left": ["rank-0"], "seconds": {"regroup": 0.5}})
    )
    assert run.values("ep_rank_changes_total") == {("come",): 2, ("gone",): 1}
    assert run.value("ep_standing_seconds_total", "resize") == 0.5
    run.hear(record(1, world_size=3))
    assert run.value("ep_ranks", "active") == 3


def test_a_slow_rank_counts_until_it_is_fast_again_or_gone(run):
    def straggler(member, slow, times):
        return Event("straggler", "w", {"rank": 0, "member": member, "slow": slow, "times": times})

    run.hear(straggler("rank-0", True, 4.0), straggler("rank-1", True, 6.0), straggler("rank-2", True, 3.5))
    assert (run.value("ep_slow_ranks"), run.value("ep_slow_rank_times")) == (3, 6.0)
    run.hear(straggler("rank-1", False, 1.1))
    assert (run.value("ep_slow_ranks"), run.value("ep_slow_rank_times")) == (2, 4.0)
    run.hear(Event("elastic", "w", {"left": ["rank-0"]}), Event("recovered", "w", {"lost": ["rank-2"]}))
    assert (run.value("ep_slow_ranks"), run.value("ep_slow_rank_times")) == (0, 1.0)


def test_checkpoints_are_counted_and_the_newest_is_dated(run):
    run.hear(Event("checkpoint", "url", {"seconds": 3.0}), Event("checkpoint-failed", "disk full"))
    assert (run.value("ep_checkpoints_total"), run.value("ep_checkpoint_failures_total")) == (1, 1)
    assert (run.value("ep_last_checkpoint_timestamp_seconds"), run.value("ep_checkpoint_seconds")) == (100.0, 3.0)


def test_a_figure_that_is_no_number_is_left_out_until_it_is_one_again(run):
    run.hear(record(1, loss=2.0), record(2, loss=math.nan))
    assert run.value("ep_loss") is None
    run.hear(record(3, loss=1.0))
    assert run.value("ep_loss") == 1.0


def test_no_series_is_named_by_what_changes_so_their_number_is_bounded(run):
    layers, ranks = 58, 64
    run.reading.start(START)
    for step in range(1, 30):
        load, pairs = np.random.default_rng(step).random((2, layers, 256))
        run.hear(record(step, load=load, rank_load=pairs[:, :ranks], epoch=step, placement_version=step))
        run.hear(Event("rebalance", "w", {"moves": False, "placement_version": step, "step_predicted": 1.0}))
    taken = run.reading.take()
    assert len(taken.gauges) + len(taken.totals) < 7 * layers + ranks + 100


class Exporter:
    """Where figures go, in place of Ray; `raises`: what it does instead."""

    def __init__(self, raises=None):
        self.sent, self.came, self.raises = [], threading.Event(), raises

    def send(self, figures):
        if self.raises is not None:
            raise self.raises
        self.sent.append(figures)
        self.came.set()

    def of(self, name):
        return [figures.gauges.get((name, ())) for figures in self.sent]


def exported(path, exporter, steps=100, told=None, every_s=0.01):
    failed = pytest.fail if told is None else told.append
    return Metrics(path, steps, failed, lambda run: exporter, every_s)


def test_figures_are_sent_again_and_again_so_that_none_fades(tmp_path):
    exporter = Exporter()
    with exported(tmp_path, exporter) as metrics:
        metrics.start(START)
        metrics.step(record(1, loss=3.0))
        for _ in range(5):
            exporter.came.clear()
            assert exporter.came.wait(120)
    assert exporter.of("ep_loss")[-3:] == [3.0] * 3
    sent = len(exporter.sent)
    metrics.step(record(100))
    assert len(exporter.sent) == sent  # nobody is there any more


def test_from_the_last_step_on_everything_is_sent_at_once_for_ray_goes_soon(tmp_path):
    exporter = Exporter()
    with exported(tmp_path, exporter, steps=2, every_s=1000) as metrics, Publisher([metrics]) as publisher:
        publisher.start(START)
        assert exporter.came.wait(120)
        publisher.step(record(1, loss=3.0))
        publisher.step(record(2, loss=2.0))
        publisher.event(Event("checkpoint", "url", {"seconds": 1.0}))
        assert publisher.flush(120)
        assert exporter.of("ep_loss")[-2:] == [2.0, 2.0]
        assert exporter.of("ep_checkpoint_seconds")[-1] == 1.0


@pytest.mark.parametrize("kind", ["interrupted", "failed", "diverged"])
def test_an_end_that_is_told_is_sent_at_once(tmp_path, kind):
    exporter = Exporter()
    with exported(tmp_path, exporter, every_s=1000) as metrics:
        metrics.start(START)
        assert exporter.came.wait(120)
        metrics.step(record(1, loss=3.0))
        metrics.event(Event(kind, "why"))
        assert exporter.of("ep_loss")[-1] == 3.0


def test_figures_that_cannot_be_sent_are_told_once_and_the_run_goes_on(tmp_path):
    told = []
    with exported(tmp_path, Exporter(RuntimeError("no agent")), steps=1, told=told) as metrics:
        metrics.start(START)
        metrics.step(record(1))
        metrics.step(record(2))
    assert told == ["metrics are exported no more, the run goes on: RuntimeError: no agent"]


def test_a_run_with_observe_metrics_off_exports_nothing(tmp_path):
    made = []
    for words, listeners in (("true", 1), ("false", 0)):
        cfg = load_config(None, [f"observe.metrics={words}"])
        with listener.exported(cfg, tmp_path, pytest.fail, made.append) as found:
            assert len(found) == listeners
    assert made == [tmp_path.name]


def test_names_follow_the_conventions_of_prometheus():
    for metric in METRICS.values():
        assert re.fullmatch(r"ep_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert "run" not in metric.tags


def test_the_table_in_metrics_md_has_each_metric_with_its_type_tags_and_meaning():
    rows = re.findall(r"^\| `ray_ep_.*\|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    assert rows == [metric.row() for metric in METRICS.values()]


def test_a_run_of_any_name_is_exported():
    for name in ("Zürich <b>", "it's 100%", "東京"):
        exporter.Exporter(name).send(
            Taken({("ep_epoch", ()): 1.0}, {("ep_steps_total", ()): 0.0}, [("ep_step_seconds", 0.1)])
        )
