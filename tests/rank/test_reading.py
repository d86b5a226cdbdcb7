"""What a rank reads of a checkpoint: its own part, counted, and held once."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ray_ep.config import load_config
from ray_ep.config.process import RANK
from ray_ep.driver.loading import told
from ray_ep.moe import find_experts
from ray_ep.rank.model import meta_model, model_config
from ray_ep.rank.pretrained.load import load_pretrained
from ray_ep.rank.pretrained.reading import Read, Reading, words
from tests.models import build
from tests.rank.quantise import FP8, fp8, mxfp4, tiny, write

LOAD = """
import ctypes, gc, json, sys
import torch
from pathlib import Path
from transformers import AutoConfig
from ray_ep.moe import find_experts
from ray_ep.rank.model import meta_model
from ray_ep.rank.pretrained.load import load_pretrained
from ray_ep.rank.pretrained.reading import Reading

torch.set_num_threads(1)
path, rank = Path(sys.argv[1]), int(sys.argv[2])

def own_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def from_disk():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))

class Watched(Reading):  # looks at each read: by time, a busy machine would miss the peak
    peak = 0.0

    def add(self, size):
        self.peak = max(self.peak, own_mb())
        super().add(size)

    def end(self):
        self.peak = max(self.peak, own_mb())
        super().end()

def load(path, reading):
    model = meta_model(AutoConfig.from_pretrained(path))
    rows = {n: list(range(rank, m.num_experts, 2))[::-1] for n, m in find_experts(model).items()}
    load_pretrained(model, path, rows, reading)
    return model

load(path.with_name("small"), Reading())  # whatever is imported or started at the first time
print("ready", flush=True)
sys.stdin.readline()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what imports have left free is not given to the weights unseen
before, disk, watched = own_mb(), from_disk(), Watched()
model = load(path, watched)
sizes = [p.numel() * p.element_size() / 2**20 for m in find_experts(model).values() for p in m.parameters()]
peak, disk = watched.peak - before, from_disk() - disk
print(json.dumps({"peak": peak, "experts": sum(sizes), "largest": max(sizes), "disk": disk}))
"""


@pytest.mark.slow
def test_two_ranks_of_a_node_hold_their_share_and_little_more_and_fetch_each_byte_once(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "small")
    big = {"hidden_size": 128, "intermediate_size": 512, "num_local_experts": 16, "num_hidden_layers": 24,
           "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    build("mixtral", **big).save_pretrained(tmp_path / "big")
    file = tmp_path / "big" / "model.safetensors"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, tmp_path / "big", str(rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **RANK},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [r.stdout.readline() for r in ranks] == ["ready\n"] * 2
        forget(file)
        for r in ranks:
            r.stdin.write("\n")
            r.stdin.flush()
        told = [json.loads(r.communicate(timeout=300)[0]) for r in ranks]
    finally:
        [r.kill() for r in ranks]
    for t in told:
        # Beside the experts: what is stacked, and the stack. Dense weights are pages of the file, not copies.
        assert t["peak"] < t["experts"] + 6 * t["largest"]
    assert sum(t["disk"] for t in told) < 1.1 * file.stat().st_size, "the page cache is the node's, not a rank's"


def forget(file):
    """Have the system forget a file's pages: the next one who reads it fetches it from disk."""
    with file.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("kind", ["plain", "fp8", "mxfp4"])
def test_what_was_to_be_read_was_read_and_nothing_twice(tmp_path, kind):
    tensors = tiny(tmp_path, "gpt_oss" if kind != "fp8" else "deepseek_v3")
    if kind == "fp8":
        write(tmp_path, fp8(tensors)[0], quantization_config=FP8)
    elif kind == "mxfp4":
        write(tmp_path, mxfp4(tensors), quantization_config={"quant_method": "mxfp4"})
    file, reads = tmp_path / "model.safetensors", []
    for rank in range(2):
        model = meta_model(config_of(tmp_path))
        reading = Reading()
        rows = {n: list(range(rank, m.num_experts, 2)) for n, m in find_experts(model).items()}
        load_pretrained(model, tmp_path, rows, reading)
        reads.append(reading.so_far())
    assert all(r.done == r.total for r in reads)
    assert max(r.total for r in reads) < file.stat().st_size
    assert sum(r.total for r in reads) > 0.9 * file.stat().st_size - 8 - header(file)


def config_of(path):
    return model_config(load_config(None, [f"model.path={path}"]).model, 8)


def header(file: Path):
    return int.from_bytes(file.read_bytes()[:8], "little")


def test_progress_is_told_in_bytes_and_with_a_rate():
    now = [0.0]
    reading = Reading(clock=lambda: now[0])
    reading.begin(4_000_000_000)
    now[0] = 2.0
    reading.add(1_000_000_000)
    assert reading.so_far() == Read(1_000_000_000, 4_000_000_000, 2.0)
    assert words([reading.so_far()] * 2) == "2.0 of 8.0 GB, 1,000 MB/s"
    reading.end()
    now[0] = 9.0
    assert reading.so_far().seconds == 2.0
    assert words([Read(0, 5_000_000, 0.0)]) == "0.0 of 5.0 MB"


def test_who_waits_hears_of_it_while_ranks_read_and_no_more_afterwards():
    heard = threading.Event()

    class Ranks:
        def reads(self):
            return [Read(5_000_000, 10_000_000, 1.0)]

    said = []
    with told(Ranks(), lambda name: (said.append(name), heard.set()), every_s=0.01):
        assert heard.wait(60)
    assert set(said) == {"loading the model: 5.0 of 10.0 MB, 5 MB/s"}
    assert not [t for t in threading.enumerate() if t.name == "reading"]
