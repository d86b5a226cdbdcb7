"""A run as a Ray job that is stopped: given the time it saves, it leaves nothing, and the next attempt goes on."""

import json
import time

import pytest

from tests.distributed.conftest import ROOT
from tests.distributed.test_driver_death import OPTIONS, SOON_S, STEPS, alive

pytestmark = pytest.mark.slow


@pytest.fixture
def attempt(here, cluster, faults):
    """Submit the run, always with the same words; with `stop_s` Ray waits so long for it to stop."""

    def submit(name, *overrides, script=False, stop_s=None):
        own = [x for x in here.tiny(*OPTIONS, *overrides) if not x.startswith(("data.files", "run_dir"))]
        program = ["env", f"PYTHONPATH={ROOT}", "python", "-m", "tests.faults", faults.save()] if script else ["ray-ep"]
        env = {} if stop_s is None else {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)}
        return here.start(
            "ray", "job", "submit", "--address", cluster.job, "--submission-id", f"{here.path.name}-{name}",
            "--runtime-env-json", json.dumps({"env_vars": env}), "--",
            *program, "train", *own, f"data.files=[{here.path}/text.txt]", f"run_dir={here.path}/run", "resume=auto",
        )  # fmt: skip

    def stop(name):
        address = ["--address", cluster.job]
        return here.start("ray", "job", "stop", *address, "--no-wait", f"{here.path.name}-{name}")

    submit.stop = stop
    return submit


def goes_on(here, lines, attempt, *overrides):
    """The next attempt ends well; (step, loss, norm) in the order in which they were told."""
    again = attempt("again", *overrides)
    assert again.wait(200) == 0, again.out + again.err
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines(here.path / "run" / "metrics.jsonl")]


def test_a_stopped_job_whose_step_takes_too_long_is_killed_leaves_nothing_and_is_retried_from_its_snapshot(
    here, lines, faults, attempt
):
    faults.slow(30, call=8)
    to_disk = ["snapshot.every=2", "snapshot.to_disk=true"]
    first = attempt("first", *to_disk, script=True)
    first.until(lambda: faults.happened("slow") >= 2, 200, "the step that takes long")
    attempt.stop("first")
    events = here.path / "run" / "events.jsonl"
    first.until(lambda: [e for e in lines(events) if e["kind"] == "signal"], 200, "the signal")
    began, pids = time.monotonic(), (faults.pid(0), faults.pid(1))
    while any(map(alive, pids)) and time.monotonic() < began + 3 + SOON_S:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    kinds = [e["kind"] for e in lines(events)]
    assert kinds[kinds.index("signal") :] == ["signal"], "it had no time for more"
    told = goes_on(here, lines, attempt, *to_disk)
    assert [step for step, *_ in told] == [*range(1, 8), *range(7, STEPS + 1)]
    assert told[7] == pytest.approx(told[6], rel=1e-5), "the step that was made again"


def test_a_stopped_job_that_is_given_the_time_saves_and_its_next_attempt_goes_on_there(here, lines, faults, attempt):
    faults.slow(6, call=5)
    first = attempt("first", script=True, stop_s=120)
    first.until(lambda: faults.happened("slow") >= 2, 200, "the step that takes long")
    attempt.stop("first")
    first.wait(200)
    kinds = [e["kind"] for e in lines(here.path / "run" / "events.jsonl")]
    assert {"signal", "interrupted", "checkpoint"} <= set(kinds)
    done = lines(here.path / "run" / "metrics.jsonl")[-1]["step"]
    assert (here.path / "run" / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    assert [step for step, *_ in goes_on(here, lines, attempt)] == list(range(1, STEPS + 1))
