"""A real run, seen and steered from other processes: paused through a loss, saved, moved, ended."""

import json
import os
import signal

import numpy as np
import pytest

from ray_ep.control.address import target_of
from ray_ep.control.client import Client
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.placement import Placement


@pytest.mark.slow
def test_a_run_is_paused_through_a_loss_resumed_saved_given_a_placement_and_ended(here, lines, faults, cluster):
    run = here.path / "run"
    options = ["optim.steps=100000", "run_dir=run", "cluster.ranks=3", "cluster.cpus_per_rank=0.5", "snapshot.every=2"]
    faults.slow(0.05)
    command = here.train(
        *options, "optim.schedule=constant_with_warmup", "eval.every=0", "elastic.wait_s=0", faults=faults,
        RAY_ADDRESS=cluster.driver,
    )  # fmt: skip

    def ask(*words):
        asked = here.ray_ep(*words)
        assert asked.wait(200) == 0, asked.err
        return json.loads(asked.out) if "--json" in words else asked.out

    def status():
        with Client(target_of(str(run))) as client:
            return client.call(pb.StatusRequest()).status

    command.until(lambda: len(lines(run / "metrics.jsonl")) >= 3, 200, "steps")
    assert ask("pause", "run").startswith("paused after step ")
    before = status()
    assert (before.state, before.membership.active) == (pb.RUN_STATE_PAUSED, 3)
    os.kill(faults.pid(1), signal.SIGKILL)
    command.until(lambda: status().membership.epoch == 1 and status().state == pb.RUN_STATE_PAUSED, 200, "the recovery")
    after = status()
    assert (after.state, after.membership.active) == (pb.RUN_STATE_PAUSED, 2)
    assert after.done <= before.done
    saved = ask("checkpoint", "run", "--json")
    assert os.path.isfile(f"{saved['url']}/manifest.json")
    assert ask("resume", "run").startswith("the run goes on")
    command.until(lambda: status().done > before.done + 3, 200, "steps after it")

    ask("placement", "run", "--out", str(here.path / "now.json"))
    now = Placement.load(here.path / "now.json")
    slots = now.slots.copy()
    slots[:, [0, 1], [0, 0]] = slots[:, [1, 0], [0, 0]]
    (here.path / "other.json").write_text(Placement(slots, now.num_experts).to_json())
    assert ask("placement", "run", "--apply", str(here.path / "other.json")).startswith(
        "experts have moved to version "
    )
    shown = ask("placement", "run", "--json")["placement"]
    assert np.array_equal(np.reshape(shown["slots"], slots.shape), slots)
    assert "the run has ended after step " in ask("stop", "run")
    assert command.wait(200) == 130, command.err
    assert not (run / "control.json").exists()
    asked = [json.loads(x) for x in (run / "audit.jsonl").read_text().splitlines()]
    assert [(e["what"], e["result"]) for e in asked] == [
        (what, result)
        for what in ("Pause", "Checkpoint", "Resume", "ApplyPlacement", "Stop")
        for result in ("ASKED", "OK")
    ]
    steps = lines(run / "metrics.jsonl")
    assert asked[-1]["words"] == f"the run has ended after step {steps[-1]['step']}, which is saved"
    assert command.left() == {}
