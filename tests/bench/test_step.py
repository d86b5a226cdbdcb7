"""`ray-ep bench step`: real training steps of two ranks, in turn."""

import json

import pytest
from click.testing import CliRunner

from ray_ep.cli import main

TINY = [
    "model.overrides={hidden_size: 16, num_hidden_layers: 1, num_experts: 4, moe_intermediate_size: 16}",
    "model.overrides.num_experts_per_tok=2",
    "batch={sequences: 4, length: 16}",
    "router.force=skewed",
]


@pytest.mark.slow
def test_it_compares_imposed_balance_with_the_routing_as_it_is():
    done = CliRunner().invoke(main, ["bench", "step", "--json", "--warm", "2", "--rounds", "1", *TINY])
    assert done.exit_code == 0, done.output
    balanced, off, on = map(json.loads, done.output.splitlines())
    assert [row["mode"] for row in (balanced, off, on)] == ["balanced", "off", "on"]
    assert balanced["share"] == 1.0
    assert balanced["expert_load"] <= 1.1 < off["expert_load"]
    assert off["ms"] * off["share"] == pytest.approx(balanced["ms"])


def test_one_rank_has_nothing_to_balance():
    done = CliRunner().invoke(main, ["bench", "step", "cluster.ranks=1"])
    assert done.exit_code == 2
    assert "cluster.ranks=1" in done.output
