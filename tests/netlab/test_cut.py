"""A host that is cut off in a step: the run ends in seconds, and says which host and which rank it was."""

import re
import time
from subprocess import PIPE, STDOUT, Popen

import pytest

from .conftest import command, needs_root, netlab
from .runs import RAY_EP, lines

pytestmark = [needs_root, pytest.mark.lab]  # it measures seconds

TINY = """model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2,
num_experts: 8, head_dim: 8}"""
OPTIONS = "optim.steps=100000 batch.sequences=8 batch.length=32 eval.every=0 topology.measure=false balance.in_step=off"
OPTIONS += " snapshot.every=0"


def test_a_cut_host_ends_the_run_within_seconds_and_is_named_with_its_rank(make_lab, tmp_path):
    path, lab = make_lab(2, {"default": "400mbit"})
    netlab("up", path)
    run = tmp_path / "run"
    train = command("exec", path, "--", *RAY_EP, "train", TINY, *OPTIONS.split(), f"run_dir={run}")
    with Popen(train, stdout=PIPE, stderr=STDOUT, text=True) as process:
        limit = time.monotonic() + 100
        while len(lines(run / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        assert lines(run / "metrics.jsonl")
        netlab("cut", path, "h1")
        cut = time.monotonic()
        words = process.communicate(timeout=60)[0]
        seconds = time.monotonic() - cut
    netlab("down", path)
    assert process.returncode == 1, words
    # Ray may miss the node first, on a busy machine.
    named = rf"rank 1 on \S+ .*: no answer from node \S+ \({lab.address('h1')}\)"
    assert re.search(named, words), words
    assert seconds < 8, words
    assert lines(run / "events.jsonl")[-1]["kind"] == "failed"
