"""A rank that is lost while experts move: the run ends as it does in a step, and goes on with the old placement."""

import re
from pathlib import Path

import pytest

import ray_ep

PACKAGE = str(Path(ray_ep.__file__).parent.parent)
RUN = """
import os, sys
import ray_ep
from ray_ep.placement.planner import plan as planner
from ray_ep.cli import main

planner.warm()  # so that the decision does not wait for a compiler
sys.exit(main(["train", *sys.argv[1:]], standalone_mode=False))
"""
FAULT = """
# Put on PYTHONPATH as sitecustomize: rank 1 is gone once the others have agreed to move. Nothing is imported early.
import importlib.abc, importlib.util, os, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ray_ep.moe.migrate":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module.Shipment))
        return spec

def patch(Shipment):
    exchange = Shipment.exchange
    Shipment.exchange = lambda self, group, parts: os._exit(9) if group.rank == 1 else exchange(self, group, parts)

if os.environ.get("RAY_EP_TEST_FAULT") == "1":
    sys.meta_path.insert(0, Hook())
"""


@pytest.mark.slow
def test_a_rank_killed_in_a_move_ends_the_run_and_it_goes_on_with_the_old_placement(here, lines):
    (here.path / "sitecustomize.py").write_text(FAULT)
    same = [
        "model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 512, num_hidden_layers: 2, "
        "num_experts: 8, head_dim: 8}",
        "data.files=[text.txt]", "batch.sequences=8", "batch.length=128", "cluster.cpus_per_rank=0.5",
        "router.force=skewed", "exchange.kind=flat", "balance.in_step=off", "eval.every=0", "run_dir=run",
        "checkpoint.every=1",
    ]  # fmt: skip
    env = {"PYTHONPATH": f"{here.path}:{PACKAGE}"}
    broken = here.start(
        "python", "-c", RUN, *same, "placement.every=2", "optim.steps=500", **env, RAY_EP_TEST_FAULT="1"
    )
    assert broken.wait(200) == 1, broken.err
    assert re.search(r"rank 1 on \S+ died", broken.err)
    assert broken.left(15) == {}
    events = [e["message"] for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "rebalance"]
    assert events[-2].startswith("move ")
    assert re.match(r"the move was broken off: rank 1 on \S+ died", events[-1])
    assert [p.name for p in (here.path / "run" / "placements").iterdir()] == ["0000.json"]

    done = lines(here.path / "run" / "metrics.jsonl")[-1]["step"]
    again = here.start("python", "-c", RUN, *same, "placement.every=0", f"optim.steps={done + 3}", "resume=auto", **env)
    assert again.wait(120) == 0, again.err
    metrics = lines(here.path / "run" / "metrics.jsonl")
    assert metrics[-1]["step"] == done + 3
    assert {m["placement_version"] for m in metrics} == {0}
