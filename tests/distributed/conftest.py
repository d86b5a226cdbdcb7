"""Real `ray-ep` processes: started, watched and, whatever a test does, gone at its end.

Everything that a command starts inherits a mark in its environment: that, not the parent chain, tells who belongs to it
(an orphan has no parent left).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
MARK = "RAY_EP_TEST_MARK"
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Become a program that is killed (9) once the thread that started it has ended (1: PR_SET_PDEATHSIG)."""
TINY = (
    "model.overrides={hidden_size: 32, intermediate_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, "
    "num_experts: 8, head_dim: 8}"
)


@dataclass
class Command:
    """A process in a session of its own, and all that it starts."""

    process: subprocess.Popen
    mark: str
    files: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def out(self):
        return self.files.with_suffix(".out").read_text()

    @property
    def err(self):
        return self.files.with_suffix(".err").read_text()

    def wait(self, limit_s):
        """Exit status within the limit."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit_s} s; {self.offspring()}; last words: {self.err[-1000:]}")

    def until(self, condition, limit_s, what):
        """Wait for a condition while the process runs; returns what it returned."""
        limit = time.monotonic() + limit_s
        while not (answer := condition()):
            if self.process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"{what}: not within {limit_s} s, exit {self.process.returncode}; {self.err[-1000:]}")
            time.sleep(0.1)
        return answer

    def offspring(self):
        """{pid: command line} of the live processes that it started, however deep; not itself."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            try:
                marked = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if marked and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue  # it has ended meanwhile
        return found

    def left(self, grace_s=20.0):
        """What it left behind: Ray's helpers get a moment to notice that the head has gone."""
        limit = time.monotonic() + grace_s
        while (found := self.offspring()) and time.monotonic() < limit:
            time.sleep(0.1)
        return found

    def end(self):
        for pid in [self.process.pid] * (self.process.poll() is None) + list(self.offspring()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


@dataclass
class Place:
    """A working directory with a small text, from which commands are started."""

    path: Path
    commands: list = field(default_factory=list)

    def start(self, *arguments, **env):
        """Start a program of the virtual environment, which ends with the test run, however that ends."""
        files, mark = self.path / f"command-{len(self.commands)}", uuid.uuid4().hex
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        clean |= {"PATH": f"{BIN}:{os.environ['PATH']}", MARK: mark, **env}
        with open(files.with_suffix(".out"), "w") as out, open(files.with_suffix(".err"), "w") as err:
            process = subprocess.Popen(
                [sys.executable, "-ISc", TIED, str(BIN / arguments[0]), *arguments[1:]], cwd=self.path, env=clean,
                stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.commands.append(Command(process, mark, files))
        return self.commands[-1]

    def tiny(self, *overrides):
        """Overrides of a run of a fraction of a second a step on two ranks that share a CPU each half."""
        steady = "balance.in_step=off"  # what it does depends on the clock
        return [TINY, "data.files=[text.txt]", "batch.sequences=8", "batch.length=32", steady, *overrides]

    def train(self, *overrides, faults=None, **env):
        """Start `ray-ep train` with the tiny model; its ranks follow the script of faults."""
        return self.ray_ep("train", *self.tiny(*overrides), faults=faults, **env)

    def ray_ep(self, *arguments, faults=None, **env):
        """Start `ray-ep`."""
        if faults is None:
            return self.start("ray-ep", *arguments, **env)
        return self.start("python", "-m", "tests.faults", faults.save(), *arguments, PYTHONPATH=str(ROOT), **env)


def place(path):
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / name).read_text() for name in ("argparse.py", "ast.py", "shutil.py", "inspect.py"))
    (path / "text.txt").write_text(text[:200_000])
    return Place(path)


@dataclass(frozen=True)
class Cluster:
    """Addresses: for RAY_ADDRESS and ray.init, and for `ray job submit`."""

    driver: str
    job: str


def free_ports(count):
    """Free ports that stay so: below those that the kernel gives to connections, above those of Ray's workers."""
    found = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as it, suppress(OSError):
            it.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    pytest.fail(f"no {count} free ports in 1000 of 20000 to 32000")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Ray of four CPUs on ports of its own, for all tests that are not about starting Ray; at the end it is gone."""
    ports = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports += ("ray-client-server-port", "proxy")
    numbers = dict(zip(ports, free_ports(len(ports)), strict=True))
    its = Place(tmp_path_factory.mktemp("cluster"))
    # Short, as in tests/conftest.py.
    with tempfile.TemporaryDirectory(prefix="ray_ep-", dir="/tmp", ignore_cleanup_errors=True) as short:
        proxy, head_port = numbers.pop("proxy"), numbers["port"]
        options = [f"--{k}={v}" for k, v in numbers.items()]
        first = its.start("ray-ep", "dashboards", "proxy", f"--address=127.0.0.1:{head_port}", f"--port={proxy}")
        head = its.start(
            "ray", "start", "--head", "--block", "--include-dashboard=true", "--num-cpus=4", f"--temp-dir={short}",
            "--disable-usage-stats", f"--proxy-server-url=http://127.0.0.1:{proxy}", *options,
        )  # fmt: skip
        try:
            head.until(lambda: "Ray runtime started" in head.out, 200, "the cluster")
            yield Cluster(f"127.0.0.1:{numbers['port']}", f"http://127.0.0.1:{numbers['dashboard-port']}")
        finally:
            head.end()
            first.end()


@pytest.fixture
def here(tmp_path):
    """A directory of this test."""
    it = place(tmp_path)
    yield it
    [c.end() for c in it.commands]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory of this module, for runs that several tests look at."""
    it = place(tmp_path_factory.mktemp("shared"))
    yield it
    [c.end() for c in it.commands]


@pytest.fixture(scope="session")
def lines():
    """Read a file of JSON lines; one that is not there yet has none."""

    def read(path):
        path = Path(path)
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    return read
