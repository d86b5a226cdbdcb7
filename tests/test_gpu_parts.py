"""`make gpu` where there is no GPU: it says so, its parts end in time, and tests/gpu is tried on the CPU."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import ROOT, Part, block, parts, run_part


def script(text, **more):
    return Part("a part", ["-c", text], more.pop("limit_s", 30.0), **{"needs": (), **more})


def test_a_part_that_passed_shows_of_its_log_what_was_asked_for(tmp_path):
    text = "for n in range(99): print('row', n)\nprint('noise'); print('E  first'); print('E  second')"
    ended = run_part(script(text, shown="^row", detail="^E  "), tmp_path)
    assert ended.passed
    assert ended.shown == ["E  first", "E  second", *(f"row {n}" for n in range(59, 99))]
    assert "noise" in (tmp_path / "a-part.log").read_text()


def test_a_part_that_failed_shows_the_end_of_its_log_if_nothing_else(tmp_path):
    ended = run_part(script("print('before'); raise SystemExit('it broke')", shown="^row"), tmp_path)
    assert not ended.passed
    assert ended.verdict == "exit status 1"
    assert ended.shown == ["...", "before", "it broke"] or ended.shown == ["...", "it broke", "before"]
    assert "a part: exit status 1" in block([ended])


def test_a_part_over_its_limit_is_killed_with_all_that_it_started(tmp_path):
    text = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    ended = run_part(script(text, limit_s=1.5), tmp_path, grace_s=0.3)
    assert ended.verdict == "over its limit of 2 s"
    assert not ended.passed
    assert time.monotonic() - began < 45
    (child,) = (tmp_path / "a-part.log").read_text().split()
    assert not lives(int(child))


def test_a_part_at_which_the_user_ends_the_run_says_so_and_shows_what_it_had(tmp_path):
    text = "import os, time; print('so far', flush=True); os.kill(os.getppid(), 2); time.sleep(60)"  # 2: SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us beside others
    try:
        ended = run_part(script(text), tmp_path, grace_s=2.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.verdict == "interrupted"
    assert not ended.passed
    assert "so far" in ended.shown


def lives(pid, patience_s=5.0):
    """Whether a process is there after a while; a zombie is not."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


def test_a_part_without_its_packages_is_left_out_and_says_so(tmp_path):
    ended = run_part(script("print(1)", needs=("torch", "a_package_that_nobody_has")), tmp_path)
    assert ended.verdict == "left out: a_package_that_nobody_has missing"
    assert ended.passed


def test_a_part_for_which_no_time_is_left_is_no_success(tmp_path):
    ended = run_part(script("print(1)"), tmp_path, left_s=3.0)
    assert "not reached" in ended.verdict
    assert not ended.passed


def test_each_part_names_files_and_options_that_are_there():
    words = [word for device in ("cuda", "cpu") for part in parts(device) for word in part.words]
    files = [w.rpartition("=")[2] for w in words if "tests/gpu" in w]
    modules = [w for w in words if w.startswith("tests.gpu.")]
    assert len(files) >= 10
    assert all((ROOT / file).exists() for file in files)
    assert len(modules) == 4
    assert all(find_spec(module) for module in modules)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.slow
def test_without_a_gpu_it_ends_at_once_with_a_sentence(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, timeout=100,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no GPU can be used here" in done.stderr
    assert f"torch {torch.__version__}" in done.stderr
    assert time.monotonic() - began < 60


def test_without_torch_it_ends_at_once_with_what_to_do(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart is not there')")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, timeout=100, capture_output=True, text=True, check=False,
        env={**os.environ, "OUT": str(tmp_path), "PYTHONPATH": f"{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no torch can be used here (libcudart is not there): `make setup`, or" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tests_of_the_gpu_pass_on_the_cpu_but_for_what_needs_one():
    """Among them jobs of ranks in processes of their own, which lose a peer, over gloo and through staged groups."""
    words = [sys.executable, "-m", "pytest", "tests/gpu", "--device", "cpu", "--ignore=tests/gpu/test_train.py"]
    done = subprocess.run(words, cwd=ROOT, timeout=500, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 60
