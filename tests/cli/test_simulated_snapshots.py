"""What snapshots take of a rank: worked out by hand, and the same in a run's first line and in `ray-ep simulate`."""

import json
from datetime import datetime

import numpy as np
import pytest
from click.testing import CliRunner

from ray_ep.cli import main
from ray_ep.collective import Membership
from ray_ep.config import load_config
from ray_ep.driver.forming import Formed
from ray_ep.driver.run.opening import start_of
from ray_ep.driver.start import check_run
from ray_ep.placement import RoutingStatistics, Topology, contiguous
from ray_ep.placement.cost.memory import SnapshotMemory, state_bytes

NOW = datetime(2026, 7, 1, 12, 30, 5)
LARGE = "model.overrides={hidden_size: 512, moe_intermediate_size: 256, num_hidden_layers: 2, num_experts: 8}"


def started(nodes, *overrides):
    """(run directory, the start event's MiB) of a run whose ranks have formed on `nodes`, as it leaves them."""
    cfg = load_config(None, ["data.files=[text.txt]", LARGE, f"cluster.ranks={len(nodes)}", *overrides])
    plan = check_run(cfg, NOW)
    plan.run.create(cfg)
    plan.run.release()
    path, topology = plan.run.path, Topology.of_nodes(nodes)
    formed = Formed(Membership(0, tuple(range(len(nodes))), tuple(nodes)), topology, plan.placement, None, None, 0)
    event = start_of(cfg, plan, formed, "a Ray")
    (path / "events.jsonl").write_text(json.dumps(event.line()) + "\n")
    (path / "topology.json").write_text(topology.to_json())
    RoutingStatistics(np.ones((2, 8)), np.ones((2, 8, 8))).save(path / "statistics" / "routing.npz")
    return path, event.fields["snapshot_mib"]


def simulated(*arguments):
    """(rows, notes)."""
    result = CliRunner().invoke(main, ["simulate", *map(str, arguments), "--placement", "contiguous", "--json"])
    assert result.exit_code == 0, result.output
    *rows, last = [json.loads(line) for line in result.stdout.splitlines()]
    return rows, last["notes"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)


def test_each_rank_has_two_copies_of_its_own_and_two_of_its_wards():
    placement = contiguous(3, 8, 4)  # each owns 6
    assert SnapshotMemory().most(placement, [0, 0, 1, 1], 100) == 2 * (6 + 6) * 100
    assert SnapshotMemory(dense_bytes=7).most(placement, [0, 0, 1, 1], 100) == 2 * (12 * 100 + 7)
    assert SnapshotMemory().most(placement, [0, 0, 0, 1], 100) == 2 * (6 + 18) * 100  # the one far away keeps three
    assert SnapshotMemory(taken=False).most(placement, [0, 0, 1, 1], 100) == 0


def test_a_rank_alone_takes_them_only_where_they_go_to_disk_and_keeps_nobodys():
    placement = contiguous(3, 8, 1)
    assert SnapshotMemory(dense_bytes=7).most(placement, [0], 100) == 0
    assert SnapshotMemory(alone=True, dense_bytes=7).most(placement, [0], 100) == 2 * (24 * 100 + 7)


def test_a_parameter_has_a_master_and_as_many_moments_as_its_optimizer():
    assert (state_bytes("adamw", 0.9), state_bytes("sgd", 0.9), state_bytes("sgd", 0.0)) == (12, 8, 4)


@pytest.mark.parametrize(
    ("nodes", "overrides"),
    [
        ([0, 1], []),
        ([0, 0, 1], ["optim.kind=sgd"]),
        ([0], ["snapshot.to_disk=true"]),
        ([0, 1], ["model.dtype=bfloat16", "optim.kind=sgd", "optim.beta1=0"]),
    ],
)
def test_a_run_and_its_simulation_say_the_same(nodes, overrides):
    path, mib = started(nodes, *overrides)
    ((row,), notes) = simulated(path)
    assert mib > 20
    assert int(row["snapshot_bytes"]) >> 20 == mib
    assert any(n.startswith("snapshots: ") and n.endswith("of the dense part") for n in notes)


def test_a_run_without_snapshots_has_none_in_both():
    path, mib = started([0, 1], "snapshot.every=0")
    ((row,), notes) = simulated(path)
    assert (mib, row["snapshot_bytes"]) == (0, 0)
    assert "snapshots: none, snapshot.every is 0" in notes


def test_more_ranks_have_less_of_experts_and_as_much_of_the_dense_part():
    path, _ = started([0, 1])
    (two, four), _ = simulated(path, "--nodes", "2,4", "--ranks-per-node", 1)
    experts = 2 * 8 * 3 * 512 * 256 * 12
    assert two["snapshot_bytes"] - four["snapshot_bytes"] == 4 * experts / 2 - 4 * experts / 4


def test_invented_routing_counts_experts_alone_where_their_state_is_given():
    flags = ("--synthetic", "layers=6,experts=16,top_k=4,tokens=64", "--nodes", 2, "--ranks-per-node", 2)
    ((row,), notes) = simulated(*flags, "--cost", "optimizer_bytes=1000", "--layers", 3)
    assert row["snapshot_bytes"] == 4 * (6 * 16 / 4) * 1000
    assert "snapshots: of experts alone, the size of the dense part is not known" in notes
    ((row,), notes) = simulated(*flags)
    assert row["snapshot_bytes"] == 0
    assert any(n.startswith("snapshots: none, nothing is trained") for n in notes)
