"""A command says something before it loads what takes a while; results stay alone on stdout."""

import subprocess
import sys

import pytest

PROBE = """
import builtins, sys
load = builtins.__import__
def watched(name, *more):
    if name.split(".")[0] in ("torch", "ray", "transformers"):
        print("loads", name.split(".")[0], file=sys.stderr)
        sys.exit(3)
    return load(name, *more)
builtins.__import__ = watched
from ray_ep.cli import main
main()
"""

VERBS = ("train", "export", "probe", "generate", "eval", "chaos", "bench", "layer", "step")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--json"],
        ["export", "run", "out", "--json"],
        ["probe", "--json"],
        ["generate", "checkpoint", "--prompt", "a"],
        ["eval", "checkpoint", "data", "--json"],
        ["chaos", "--json"],
        ["bench", "layer", "--json"],
        ["bench", "step", "--json"],
        ["bench", "train", "--json"],
    ],
)
def test_a_command_speaks_before_it_loads_torch_or_ray(tmp_path, arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    verb = " ".join(a for a in arguments if a in VERBS)
    first, *rest = done.stderr.splitlines()
    assert first.startswith(f"ray-ep {verb}: loading ")
    assert rest[0].startswith("loads ")
    assert done.stdout == ""


def test_a_wrong_key_is_said_alone(tmp_path):
    command = [sys.executable, "-c", PROBE, "train", "optim.stpes=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
