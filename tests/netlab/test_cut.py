"""A host that is cut off in a step: the run says in seconds which host and rank it was, and ends or goes on."""

import re
import signal
import time
from subprocess import PIPE, STDOUT, Popen

import pytest

from .conftest import command, needs_root, netlab
from .runs import RAY_EP, lines

pytestmark = [needs_root, pytest.mark.slow]

TINY = """model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2,
num_experts: 8, head_dim: 8}"""
OPTIONS = "optim.steps=100000 batch.sequences=8 batch.length=32 eval.every=0 topology.measure=false balance.in_step=off"


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_cut_host_is_named_with_its_rank_within_seconds_and_the_run_ends_or_goes_on(make_lab, tmp_path, goes_on):
    path, lab = make_lab(2, {"default": "400mbit"})
    netlab("up", path)
    run = tmp_path / "run"
    options = [*OPTIONS.split(), f"snapshot.every={10 * goes_on}", f"run_dir={run}"]
    train = command("exec", path, "--", *RAY_EP, "train", TINY, *options)
    with Popen(train, stdout=PIPE, stderr=STDOUT, text=True) as process:
        limit = time.monotonic() + 100
        while len(lines(run / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        assert lines(run / "metrics.jsonl")
        netlab("cut", path, "h1")
        cut = time.monotonic()
        if goes_on:
            while "recovered" not in kinds(run) and process.poll() is None and time.monotonic() < cut + 30:
                time.sleep(0.05)
            seconds, reached = time.monotonic() - cut, len(lines(run / "metrics.jsonl"))
            while len(lines(run / "metrics.jsonl")) < reached + 20 and process.poll() is None:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        words = process.communicate(timeout=60)[0]
        seconds = seconds if goes_on else time.monotonic() - cut
    netlab("down", path)
    assert process.returncode == (130 if goes_on else 1), words
    # Ray may miss the node first, on a busy machine.
    named = rf"rank 1 on \S+ .*: no answer from node \S+ \({lab.address('h1')}\)"
    assert re.search(named, words), words
    assert seconds < 8, words
    assert ("failed" in kinds(run), "recovered" in kinds(run)) == (not goes_on, goes_on)


def kinds(run):
    """Of the run's events."""
    return [e["kind"] for e in lines(run / "events.jsonl")]
