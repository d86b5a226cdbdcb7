"""`ray-ep train` with one rank on the GPU, as a user types it: Ray, links, exchange, steps, report.

Not run on a GPU yet. With `--device cpu` it runs on the CPU.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.gpu.ranks import ROOT

pytest.importorskip("ray", reason="needs Ray")


@pytest.mark.timeout(170)
def test_a_training_on_one_device_learns_and_ends_well(device, tmp_path):
    words = [
        sys.executable, "-c", "from ray_ep.cli import main; main()", "train", f"cluster.device={device.type}",
        "cluster.ranks=1", "optim.steps=8", "batch.sequences=4", "batch.length=64", "data.max_bytes=300000",
        "eval.sequences=4", f"run_dir={tmp_path}/run", "--json",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-2500:]
    last = json.loads(done.stdout.splitlines()[-1])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last["status"] == "done"
    assert len([s for s in steps if "loss" in s]) == 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
