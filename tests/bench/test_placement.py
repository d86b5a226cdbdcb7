import json

import numpy as np
import pytest
from click.testing import CliRunner

from ray_ep.bench.placement import SHAPES, Shape, cluster, run_balance, run_placement, speeds, trace
from ray_ep.cli import main
from ray_ep.errors import BadInput


def test_the_routing_is_a_function_of_the_seed_with_distinct_experts_a_token_and_drifts():
    shape = Shape(2, 16, 3, 2, 2, 5)
    sets = trace(shape, 1, 2, 0.5)
    assert (sets == trace(shape, 1, 2, 0.5)).all()
    assert not (sets == trace(shape, 2, 2, 0.5)).all()
    assert (np.diff(np.sort(sets, 2), axis=2) > 0).all()
    halves = np.stack([np.bincount(x.ravel(), minlength=16) for x in np.split(sets[0], 2)])
    same = np.stack([np.bincount(x.ravel(), minlength=16) for x in np.split(trace(shape, 1, 2, 0.0)[0], 2)])
    assert abs(np.diff(halves, axis=0)).sum() > 3 * abs(np.diff(same, axis=0)).sum()


def test_rows_name_every_placement_at_both_levels_and_the_plan_visits_fewest_nodes():
    rows = {r.name: r for r in run_placement("mixtral-8", repeats=1)}
    assert len(rows) == 14
    for level in ("node", "rank"):
        ours = rows[f"plan, {level}"]
        others = [rows[f"{n}, {level}"] for n in ("contiguous", "random", "load-only", "load-only by groups")]
        assert ours.remote_nodes < min(r.remote_nodes for r in others)
        assert ours.step_seconds < min(r.step_seconds for r in others)
        assert rows[f"replan, same tokens, {level}"].moved == 0


def test_a_quarter_of_the_ranks_is_slow_where_asked():
    shape = SHAPES["v3-32"]
    assert [(speeds(shape, s) == 0.5).sum() for s in ("none", "spread", "node")] == [0, 8, 8]
    assert (speeds(shape, "node")[:8] == 0.5).all()
    assert cluster(shape).num_ranks == 32


def test_the_balance_inside_a_step_evens_ranks_out_and_is_timed():
    found = run_balance("olmoe-8")
    assert found.before > 1.2 > 1.05 > found.after
    assert found.guests > 0
    assert found.milliseconds > 0
    assert "balance inside a step: " in found.line()


def test_the_command_prints_a_json_line_a_row():
    done = CliRunner().invoke(main, ["bench", "placement", "--shape=mixtral-8", "--repeats=1", "--json"])
    assert done.exit_code == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["shape"] for row in found} == {"mixtral-8"}
    assert "milliseconds" in found[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("v4",), "allowed are v3-32"), (("v3-32", 7, 1.5), "share"), (("v3-32", 7, 0.1, "all"), "spread")],
)
def test_bad_input_is_named(arguments, says):
    with pytest.raises(BadInput, match=says):
        next(run_placement(*arguments))
