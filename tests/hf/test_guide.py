"""docs/transformers.md, executed: the first block as a script under torchrun, the others after it in the same job."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.hf.loaded import hf  # noqa: F401  # skips where transformers is too old
from tests.models import build

ROOT = Path(__file__).parents[2]
USED = "from ray_ep.placement import RoutingStatistics, Topology, plan\n"


@pytest.mark.slow
def test_the_guides_script_trains_moves_and_saves_under_torchrun(tmp_path):
    script, names, moving = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.S)
    end = "dist.destroy_process_group()\n"
    assert script.endswith(end)
    more = USED + moving + 'model.save_pretrained("moved")\nassert "ray" not in sys.modules\nexperts.group.barrier()\n'
    job = script.removesuffix(end).replace('"out", ', '"out", use_cpu=True, report_to=[], ') + names + more + end
    (tmp_path / "train.py").write_text(job)
    (tmp_path / "text").write_bytes((ROOT / "README.md").read_bytes())
    plain = build("qwen3_moe", vocab_size=256)
    plain.save_pretrained(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*torchrun, "train.py", "model", "text"], capture_output=True, text=True,
        timeout=220, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"slowest rank \d\.\d\d times the mean, \d\.\d\d as computed", done.stdout)
    last, moved = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f).named_parameters()) for f in ("out/last", "moved")
    )
    before = dict(plain.named_parameters())
    assert last.keys() == before.keys()
    assert all(last[name].equal(p) for name, p in moved.items())
    assert any(not last[name].equal(p) for name, p in before.items())
