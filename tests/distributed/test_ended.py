"""A test run that is ended, in whatever way, takes along what it started."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTS = """
import sys, time
from pathlib import Path
from tests.distributed.conftest import place
command = place(Path(sys.argv[1])).start("python", "-c", "import time; print('there', flush=True); time.sleep(60)")
command.until(lambda: command.out, 200, "its first word")
print("both", flush=True)
time.sleep(60)
"""
IN_RAY = [
    "-m", "pytest", "-p", "no:cacheprovider",
    f"{ROOT}/tests/distributed/test_ray_backend.py::test_rows_of_uneven_sizes_arrive_in_the_order_of_their_senders",
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Start a program of ours; (the process, what lists the command lines of all that it started)."""
    mark, started = uuid.uuid4().hex, []

    def start(*arguments):
        env = {**os.environ, "ENDED": mark, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, lambda: [line for pid, line in marked(mark).items() if pid != process.pid]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def marked(mark):
    """{pid: command line} of live processes with a mark in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if f"ENDED={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # no process, or one that has ended meanwhile
    return found


def becomes(condition, limit_s):
    """Whether it does within the limit."""
    limit = time.monotonic() + limit_s
    while not condition() and time.monotonic() < limit:
        time.sleep(0.1)
    return bool(condition())


def test_a_command_ends_with_the_process_that_started_it(run, tmp_path):
    process, children = run("-c", STARTS, str(tmp_path))
    assert process.stdout.readline() == "both\n"
    assert len(children()) == 1
    process.kill()
    assert becomes(lambda: not children(), 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ray_of_a_test_run_ends_with_it(run, number):
    process, children = run(*IN_RAY)
    assert becomes(lambda: any("raylet" in line for line in children()), 90)
    process.send_signal(number)
    assert process.wait(200) != 0
    assert becomes(lambda: children() == [], 15), children()
