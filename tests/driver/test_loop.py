"""The step loop with ranks that answer as a test says: what a signal or a failure in the middle leaves and tells."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from ray_ep.config import load_config
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.loop import Driver
from ray_ep.driver.rundir import RunDir
from ray_ep.errors import RankError
from ray_ep.rank.clock import STEP_PHASES
from ray_ep.rank.results import StepResult, Usage
from ray_ep.rank.saved.checkpoint import Directory
from tests.driver.scenes import NOWHERE, RANKS, statistics, step, topology

SECONDS = {"migration_seconds": 0.0, "rebalance_seconds": 0.0}


def result():
    s = step()
    usage = Usage(0.2, 0.1, 0.1, 0.0, s.sent[0], s.pairs[0], np.zeros(7), np.zeros(len(STEP_PHASES)))
    return StepResult(0, 1.0, 0.0, 0.0, 0.0, 0.0, 1024, s.load, usage)


class FakeRanks:
    """Ranks that do at once what they are asked; `meanwhile` happens before they answer."""

    def __init__(self, interrupt):
        self.interrupt, self.calls, self.stopped, self.meanwhile = interrupt, [], 0, {}

    def topology(self):
        return topology()

    def stop(self):
        self.stopped += 1

    def call(self, method, *args):
        self.calls.append(method)
        said = self.meanwhile.pop((method, self.calls.count(method)), lambda: "done")()
        self.interrupt()  # as a wait does between its slices
        answers = {"train_step": result(), "evaluate": (2.0, []), "statistics": statistics(), "save": {}}
        return [None if said == "left" else answers[method]] * RANKS


@pytest.fixture
def running(tmp_path):
    """A driver on formed ranks."""
    with Interrupt().caught() as interrupt:
        interrupt.hold()

        def make(*overrides):
            cfg = load_config(None, [f"run_dir={tmp_path}", "optim.steps=5", "eval.every=2", *overrides])
            corpus = SimpleNamespace(source="a text", held_out=[1])
            run = RunDir(tmp_path)
            run.create(cfg)
            plan = SimpleNamespace(run=run, corpus=corpus, config=AutoConfig.for_model("qwen3_moe"), placement=NOWHERE,
                                   signature={"w": [4]}, checkpoint=None)  # fmt: skip
            said, ranks = [], FakeRanks(interrupt)
            ear = SimpleNamespace(step=lambda m: said.append(("step", m["step"])), event=lambda *e: said.append(e))
            driver = Driver(cfg, plan, ranks, [run, ear], interrupt)
            driver.mover = SimpleNamespace(placement=NOWHERE, after_step=lambda *a: SECONDS)
            return driver, ranks, said

        yield make


def terminate(then="done"):
    def meanwhile():
        os.kill(os.getpid(), signal.SIGTERM)
        return then

    return meanwhile


def signals(said):
    return [message for kind, message in said if kind == "signal"]


def test_a_signal_in_a_step_lets_it_be_finished_and_saved(running, tmp_path):
    driver, ranks, said = running()
    ranks.meanwhile["train_step", 3] = terminate()
    assert driver.run() == "interrupted"
    (words,) = signals(said)
    assert words.startswith("SIGTERM: step 3 is finished first (about 1 s), then ")
    assert ranks.stopped == 1
    assert ("step", 3) in said
    assert Directory(f"{tmp_path}/checkpoints").steps() == [3]


def test_a_step_of_several_passes_is_broken_off_and_the_state_before_it_saved(running, tmp_path):
    driver, ranks, said = running("batch.accumulation=4")
    ranks.meanwhile["train_step", 3] = terminate("left")
    assert driver.run() == "interrupted"
    assert "step 3 is broken off at its next pass" in signals(said)[0]
    assert ("step", 3) not in said
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_an_evaluation_is_broken_off_and_its_step_is_saved(running, tmp_path):
    driver, ranks, said = running()
    ranks.meanwhile["evaluate", 1] = terminate("left")
    assert driver.run() == "interrupted"
    assert "the evaluation is broken off" in signals(said)[0]
    assert driver.plan.run.metrics()[-1]["step"] == 2
    assert "eval_loss" not in driver.plan.run.metrics()[-1]
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_a_signal_while_saving_lets_that_be_finished(running, tmp_path):
    driver, ranks, said = running("checkpoint.every=2")
    ranks.meanwhile["save", 1] = terminate()
    assert driver.run() == "interrupted"
    assert "the checkpoint of step 2 is finished first" in signals(said)[0]
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_a_lost_rank_is_an_event_with_the_steps_lost_and_the_command(running, tmp_path):
    driver, ranks, _ = running("checkpoint.every=2")

    def die():
        raise RankError(1, "rank 1 on beta died: killed\nand more")

    ranks.meanwhile["train_step", 4] = die
    with pytest.raises(RankError) as e, driver.told():
        driver.run()
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    lost = (
        f"the newest checkpoint is of step 2: 1 step is lost; go on with: ray-ep train run_dir={tmp_path} resume=auto"
    )
    assert '"kind": "failed"' in events[-1]
    assert f"rank 1 on beta died: killed, after step 3; {lost}" in events[-1]
    assert e.value.__notes__ == [lost]
