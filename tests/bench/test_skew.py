import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_ep.bench.contenders import WORKS
from ray_ep.bench.routing import ROUTINGS, check_routing, route
from ray_ep.errors import BadInput

WORK = WORKS["A"]
RAY_EP = str(Path(sys.executable).parent / "ray-ep")


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_routing_is_a_function_of_name_seed_and_step_with_distinct_experts_a_token(name, ranks):
    first = [route(name, WORK, r, ranks, 0, 3) for r in range(ranks)]
    assert all(torch.equal(a, route(name, WORK, r, ranks, 0, 3)) for r, a in enumerate(first))
    assert not torch.equal(first[0], route(name, WORK, 0, ranks, 1, 3))
    assert all(len(set(row)) == WORK.top_k for a in first for row in a.tolist())
    assert sum(len(a) for a in first) == ranks * WORK.tokens


def load(name, step=0, ranks=2):
    every = torch.cat([route(name, WORK, r, ranks, 0, step) for r in range(ranks)])
    return torch.bincount(every.flatten(), minlength=WORK.experts) / every.numel()


def test_each_kind_is_as_skewed_as_it_says():
    assert load("balanced").max() < 1.1 / 16
    assert load("80:4")[:4].sum() == pytest.approx(0.8, abs=0.01)
    assert load("zipf")[0] > 3 * load("zipf")[5]
    assert load("hot-rank")[8:].sum() > 0.7
    assert abs(load("spread")[:8].sum() - 0.5) < 0.05
    assert load("zero")[8:].sum() == 0
    assert load("rotating", 0)[:8].sum() > 0.7
    assert load("rotating", 1)[8:].sum() > 0.7
    assert load("burst", 2).max() < 1.1 / 16
    assert load("burst", 3)[:4].sum() > 0.9
    assert len(route("ragged", WORK, 0, 4, 0, 0)) == 1024


@pytest.mark.parametrize("wrong", ["flat", "120:4", "80", ":4"])
def test_an_unknown_routing_is_named_with_what_is_allowed(wrong):
    with pytest.raises(BadInput, match=f"--routing={wrong}: allowed are balanced, zipf"):
        check_routing(wrong)


@pytest.mark.slow
def test_brief_leaves_out_the_layer_without_balance():
    command = [RAY_EP, "bench", "layer", "--work=C", "--dtype=float32", "--pass=forward", "--malloc=tuned"]
    done = subprocess.run(
        [*command, "--rounds=1", "--routing=80:4", "--brief", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["off_ms"], row["off_share"]) == (None, None)
    assert {name: len(ms) for name, ms in row["rounds_ms"].items()} == {"auto": 1, "ideal": 1}
    assert row["auto_share"] == pytest.approx(row["ideal_ms"] / row["auto_ms"])
