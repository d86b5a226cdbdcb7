"""A real run records who computed for its sampled tokens, also while experts move and a rank is lost."""

import json

import numpy as np
import pyarrow.dataset
import pytest

from ray_ep.placement import Placement
from ray_ep.rank.step.recording import sampled

RATE, STEPS, TOKENS, LAYERS, TOP_K = 0.25, 8, 8 * 32, 2, 2


@pytest.mark.slow
def test_a_run_that_loses_a_rank_has_each_sampled_token_once_with_where_it_was_computed(here, lines, faults, cluster):
    faults.kill(rank=1, at="ray_ep.rank.trainer:Trainer.finish", call=5)
    options = [f"optim.steps={STEPS}", "snapshot.every=2", "placement.slots_per_rank=5", "elastic.max_ranks=2"]
    command = here.train(
        *options, "run_dir=run", f"provenance.sample={RATE}", "cluster.cpus_per_rank=0.5", faults=faults,
        RAY_ADDRESS=cluster.driver,
    )  # fmt: skip
    assert command.wait(200) == 0, command.err
    run = here.path / "run"
    rows = pyarrow.dataset.dataset(run / "provenance", exclude_invalid_files=False).to_table().to_pylist()
    assert len({(r["step"], r["position"], r["layer"], r["choice"]) for r in rows}) == len(rows)
    for step in range(1, STEPS + 1):
        got = sorted({r["position"] for r in rows if r["step"] == step})
        assert got == np.flatnonzero(sampled(0, step, np.arange(TOKENS), RATE)).tolist(), f"step {step}"
    assert len(rows) == len({(r["step"], r["position"]) for r in rows}) * LAYERS * TOP_K
    assert {r["epoch"] for r in rows} >= {0, 1}
    placements = {int(p.stem): Placement.load(p) for p in (run / "placements").glob("*.json")}
    for r in rows:
        placement, where = placements[r["placement_version"]], (r["layer"], r["expert"])
        assert r["rank"] in placement.ranks_of(*where)
        assert r["kind"] == ("primary" if placement.owner[where] == r["rank"] else "replica")
        assert len(r["node"]) == 56
        assert (r["device"], r["home_device"]) == ("cpu", "cpu")
        assert r["host"] == r["home_host"] != ""

    shown = here.ray_ep("trace", "run", "--step", str(STEPS), "--token", str(got[0]), "--json")
    assert shown.wait(200) == 0, shown.err
    path = json.loads(shown.out)
    assert list(path["layers"]) == ["0", "1"]
    assert all(hop["why"] for hops in path["layers"].values() for hop in hops)
