"""Hosts of a lab are cut off and slowed under a run: it goes on, and each host comes back as a new node."""

import json
import subprocess

import pytest

from .conftest import left, needs_root
from .runs import RAY_EP

pytestmark = [needs_root, pytest.mark.lab, pytest.mark.timeout(600)]  # it measures seconds

TINY = """model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2,
num_experts: 8, num_experts_per_tok: 8, head_dim: 8}"""
OPTIONS = (
    "cluster.ranks=3 cluster.cpus_per_rank=1 elastic.max_ranks=3 batch.sequences=8 batch.length=32 snapshot.every=2"
)


def test_a_run_whose_hosts_are_cut_off_and_slowed_loses_nothing(make_lab, tmp_path):
    path, lab = make_lab(3, {"default": "400mbit"})
    faults = ["--faults=cut,slow", "--every=30", "--minutes=1.5", "--seed=2", "--json", f"run_dir={tmp_path / 'out'}"]
    command = [*RAY_EP, "chaos", f"--lab={path}", TINY, *OPTIONS.split(), *faults]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["injected"]["cut"] + told["injected"]["slow"] == 3
    assert told["lost"] == told["problems"] == []
    assert told["clocks"]["next step after cut"]["most"] < 10
    assert told["ranks"]["came"] >= 1
    assert left(lab) == []
