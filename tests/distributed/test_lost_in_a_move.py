"""A rank that is lost while experts move: the run ends as it does in a step, and goes on with the old placement."""

import re

import pytest

from tests.faults import MOVE


@pytest.mark.slow
def test_a_rank_killed_in_a_move_ends_the_run_and_it_goes_on_with_the_old_placement(here, lines, faults):
    same = [
        "model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 512, num_hidden_layers: 2, "
        "num_experts: 8, head_dim: 8}",
        "data.files=[text.txt]", "batch.sequences=8", "batch.length=128", "cluster.cpus_per_rank=0.5",
        "router.force=skewed", "exchange.kind=flat", "balance.in_step=off", "eval.every=0", "run_dir=run",
        "checkpoint.every=1", "snapshot.every=0",
    ]  # fmt: skip
    faults.kill(rank=1, at=MOVE)
    broken = here.ray_ep("train", *same, "placement.every=2", "optim.steps=5000", faults=faults)
    assert broken.wait(200) == 1, broken.err
    assert re.search(r"rank 1 on \S+ died", broken.err)
    assert broken.left() == {}
    events = [e["message"] for e in lines(here.path / "run" / "events.jsonl") if e["kind"] == "rebalance"]
    assert events[-2].startswith("move ")
    assert re.match(r"the move was broken off: rank 1 on \S+ died", events[-1])
    assert [p.name for p in (here.path / "run" / "placements").iterdir()] == ["0000.json"]

    done = lines(here.path / "run" / "metrics.jsonl")[-1]["step"]
    again = here.ray_ep("train", *same, "placement.every=0", f"optim.steps={done + 3}", "resume=auto")
    assert again.wait(200) == 0, again.err
    metrics = lines(here.path / "run" / "metrics.jsonl")
    assert metrics[-1]["step"] == done + 3
    assert {m["placement_version"] for m in metrics} == {0}
