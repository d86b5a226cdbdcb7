"""A real run that goes on as it was: losses and learning rates, and whose its directory is while processes live on."""

import json
import os
import signal

import pytest

from ray_ep.driver.run.claim import holder

pytestmark = pytest.mark.slow
PARTS = """
import json, shutil, sys
import ray
ray.init(address=sys.argv[2], log_to_driver=False)
import ray_ep
from ray_ep.driver.run.claim import holder

own = [*json.loads(sys.argv[1]), "run_dir=elsewhere/parts", "optim.steps=6", "optim.learning_rate=0.01", "seed=5",
       "optim.warmup_steps=2", "cluster.cpus_per_rank=0.5", "checkpoint.every=3", "checkpoint.keep=0"]
first = ray_ep.train(ray_ep.load_config(None, own))
shutil.rmtree(first.dir / "checkpoints" / "step-000006")  # as if it had been killed before
again = ray_ep.train(ray_ep.load_config(None, ["resume=auto"]))
assert holder(again.dir) is None  # though Ray's processes live on
third = ray_ep.train(ray_ep.load_config(None, ["resume=auto"]))
ray.shutdown()
print(json.dumps([str(first.dir), str(again.dir), str(third.dir), third.status]))
"""


@pytest.fixture(scope="module")
def parts(shared, cluster):
    command = shared.start("python", "-c", PARTS, json.dumps(shared.tiny()), cluster.driver)
    assert command.wait(200) == 0, command.err
    return command


def test_a_resume_without_a_word_repeats_the_losses_and_learning_rates(parts, shared, lines):
    metrics = lines(shared.path / "elsewhere" / "parts" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    for before, after in zip(metrics[3:6], metrics[6:], strict=True):
        assert after["lr"] == before["lr"]
        assert (after["loss"], after["grad_norm"]) == pytest.approx((before["loss"], before["grad_norm"]), rel=1e-5)
    kinds = [e["kind"] for e in lines(shared.path / "elsewhere" / "parts" / "events.jsonl")]
    assert kinds.count("resume") == 1
    assert "config-changed" not in kinds


def test_a_finished_run_is_left_alone(parts, shared):
    path = str(shared.path / "elsewhere" / "parts")
    assert json.loads(parts.out.splitlines()[-1]) == [path, path, path, "done"]
    assert "nothing to do: 6 of 6 steps are done; optim.steps=12 trains on" in parts.err
    assert (shared.path / "elsewhere" / "parts" / "checkpoints" / "step-000006" / "manifest.json").exists()


def test_a_run_keeps_its_directory_until_it_is_killed_and_no_longer(here, lines):
    run = here.path / "run"
    command = here.train("optim.steps=100000", "run_dir=run")
    command.until(lambda: len(lines(run / "metrics.jsonl")) >= 2, 200, "two steps")
    second = here.train("run_dir=run", "resume=auto")
    assert second.wait(200) == 2
    assert f"run' is in use by process {command.process.pid} on host {os.uname().nodename} since" in second.err
    command.process.send_signal(signal.SIGKILL)
    command.process.wait(10)
    assert command.offspring()  # Ray's processes have not noticed yet
    assert holder(run) is None
    asked = here.start("ray-ep", "rebalance", "run")
    assert asked.wait(200) == 2
    assert "this run has ended" in asked.err
