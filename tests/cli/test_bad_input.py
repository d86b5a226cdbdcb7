"""What the user gets wrong is said on one screen with exit status 2, and nothing is started, written or overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from ray_ep.cli import main

TINY = [
    "model.overrides={hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_experts: 8}",
    "data.files=[text.txt]", "batch.sequences=8", "batch.length=32",
]  # fmt: skip
RAY_PROCESSES = ("raylet", "gcs_server", "ray::")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with everything that a wrong argument may name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 200)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Ten bytes.")
    (tmp_path / "bad.yaml").write_text("optim:\n  steps: [3\n")
    (tmp_path / "list.yaml").write_text("- optim\n")
    (tmp_path / "typo.yaml").write_text("optim:\n  stpes: 3\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    manifest = {"format": 1, "step": 5, "tensors": {}, "signature": {"model.embed_tokens.weight": [256, 99]}}
    for name, text in {
        "other": json.dumps(manifest),
        "damaged": '{"step": 5, "ten',
        "list": "[]",
        "bare": "{}",
    }.items():
        (tmp_path / name / "checkpoints" / "step-000005").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "step-000005" / "manifest.json").write_text(text)
        (tmp_path / name / "config.yaml").write_text("{}\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("optim: {steps: 3\n")
    (tmp_path / "unfinished" / "step-000005").mkdir(parents=True)
    return tmp_path


def tree(path):
    return {p.relative_to(path): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def ray_children():
    """Ray processes below this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(entry.name)] = (int(parent), line if state not in "ZX" else "")

    def below(pid):
        while pid in parents:
            pid = parents[pid][0]
            if pid == os.getpid():
                return True
        return False

    return [line for pid, (_, line) in parents.items() if any(w in line for w in RAY_PROCESSES) and below(pid)]


def refused(place, arguments):
    """The message of a refused command; everything else that must hold of it."""
    before, processes = tree(place), ray_children()
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) < 25
    assert max(map(len, result.output.splitlines())) < 1000
    assert result.stdout == ""
    assert tree(place) == before
    assert not ray.is_initialized()
    assert ray_children() == processes
    return result.stderr


CASES = {
    "unknown key": (["optim.stpes=3"], ["optim.stpes", "did you mean 'optim.steps'"]),
    "unknown key in a file": (["-c", "typo.yaml"], ["typo.yaml", "optim.stpes", "did you mean 'optim.steps'"]),
    "no key": (["optim.steps"], ["'optim.steps'", "expected key=value"]),
    "wrong type": (["optim.steps=many"], ["optim.steps='many'", "expected int"]),
    "outside the range": (["optim.steps=0"], ["optim.steps=0", "at least 1"]),
    "not one of the choices": (["optim.kind=adam"], ["optim.kind='adam'", "adamw, sgd"]),
    "malformed YAML file": (["-c", "bad.yaml"], ["bad.yaml", "not YAML", "line"]),
    "YAML file without keys": (["-c", "list.yaml"], ["list.yaml", "expected keys and values", "list"]),
    "missing YAML file": (["-c", "nope.yaml"], ["nope.yaml", "No such file"]),
    "malformed value": (["data.files=[a"], ["data.files=[a", "a list that nothing closes"]),
    "missing data file": ([*TINY, "data.files=[nope.txt]"], ["data.files", "nope.txt", "no file matches"]),
    "empty data": ([*TINY, "data.files=[empty.txt]"], ["empty.txt", "no text"]),
    "less than a sequence": ([*TINY, "data.files=[short.txt]"], ["short.txt", "11 tokens", "needs 33"]),
    "dense model": (["data.files=[text.txt]", "model.type=llama"], ["Llama", "no experts", "qwen3_moe"]),
    "unknown model type": (["data.files=[text.txt]", "model.type=qwen3_mo"], ["model.type='qwen3_mo'"]),
    "unknown model field": ([*TINY, "model.overrides.num_expert=8"], ["num_expert", "num_experts"]),
    "missing model path": ([*TINY, "model.path=nope"], ["nope"]),
    "too few slots": ([*TINY, "placement.slots_per_rank=3"], ["slots_per_rank=3", "8 experts", "at least 4"]),
    "imbalance below even": (["placement.imbalance=0.5"], ["placement.imbalance=0.5", "more than 1, or 0"]),
    "no half-life": (["placement.decay=0"], ["placement.decay=0", "at least 1"]),
    "no level": (["placement.level=gpu"], ["placement.level='gpu'", "auto, node, rank"]),
    "missing placement": ([*TINY, "placement.initial=nope.json"], ["nope.json"]),
    "directory of another run": ([*TINY, "run_dir=old"], ["run_dir=", "/old' ", "already holds files", "resume=auto"]),
    "run directory is a file": ([*TINY, "run_dir=text.txt"], ["run_dir=", "/text.txt' ", "is a file"]),
    "nothing to resume": ([*TINY, "resume=old"], ["old", "no complete checkpoint"]),
    "only an unfinished save": ([*TINY, "resume=unfinished"], ["unfinished", "no complete checkpoint"]),
    "run with a broken configuration": ([*TINY, "resume=broken"], ["broken"]),
    "missing checkpoint": ([*TINY, "resume=nope/step-000005"], ["nope/step-000005"]),
    "checkpoint of another model": (
        [*TINY, "resume=other"], ["another model", "model.embed_tokens.weight", "[256, 99]", "[256, 32]"],
    ),
    "damaged manifest": ([*TINY, "resume=damaged"], ["damaged/checkpoints/step-000005", "unreadable manifest"]),
    "manifest without content": ([*TINY, "resume=bare"], ["bare/checkpoints/step-000005", "unreadable manifest"]),
    "manifest that is a list": ([*TINY, "resume=list"], ["list/checkpoints/step-000005", "unreadable manifest"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), CASES.values(), ids=CASES)
def test_bad_input_is_refused_before_anything_starts(place, arguments, says):
    message = refused(place, arguments)
    assert [s for s in says if s not in message] == [], message


def test_a_damaged_checkpoint_of_the_run_directory_is_not_passed_over(place):
    message = refused(place, [*TINY, "run_dir=damaged", "resume=auto"])
    assert "unreadable manifest" in message


@pytest.mark.slow
def test_gpus_that_are_not_there_are_named_with_what_is_there(place):
    message = refused(place, [*TINY, "cluster.device=cuda"])
    assert "cluster.device=cuda" in message
    assert "the cluster has 0" in message
    assert "cluster.device=cpu" in message


@pytest.mark.slow
def test_more_ranks_than_the_machine_has_cpus_are_refused_with_its_count(place):
    message = refused(place, [*TINY, "cluster.ranks=4096"])
    assert "cluster.ranks=4096" in message
    assert f"this machine has {os.cpu_count()}" in message
    assert "cpus_per_rank" in message


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_refused_before_long(place):
    command = [Path(sys.executable).parent / "ray-ep", "train", *TINY, "cluster.address=127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cluster.address='127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_answers_without_loading_torch_or_ray(tmp_path, arguments):
    probe = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('loaded:', [m for m in ('torch', 'ray', 'transformers') if m in sys.modules]))\n"
        "from ray_ep.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", probe, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")
    assert len(done.stdout) > len("loaded: []\n")
    assert not list(tmp_path.iterdir())
