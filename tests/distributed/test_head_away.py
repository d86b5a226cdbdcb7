"""Ray's head goes and comes back, its tables on disk: the run, on another node, steps on meanwhile."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import free_ports

pytestmark = pytest.mark.slow
DRIVER = """
import sys
import ray
ray.init(address=sys.argv[1], _temp_dir=sys.argv[2], log_to_driver=False, logging_level="ERROR")  # of its own node
from ray_ep.cli import main
main(sys.argv[3:])
"""
AGENT = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")


class Head:
    """The head's process with Ray's tables (`gcs_server`), which can be killed and started again as it was."""

    def __init__(self, command):
        (self.pid,) = [pid for pid, line in command.offspring().items() if "gcs_server" in line.split()[0]]
        about = Path("/proc") / str(self.pid)
        self.line = [os.fsdecode(word) for word in (about / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = [pair.partition(b"=") for pair in (about / "environ").read_bytes().split(b"\0")]
        self.env = {os.fsdecode(k): os.fsdecode(v) for k, _, v in pairs if k}
        self.process = None

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def start(self):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.line, env=self.env, **quiet)
        self.pid = self.process.pid

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture
def nodes(here):
    """(address, temporary directory of the second node, the head): a head without CPUs, and a node with two."""
    port, *agents = free_ports(5)
    with (
        tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as first,
        tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as second,
    ):
        keeps = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{first}/tables"}
        own = [[f"--{k}={v}" for k, v in zip(AGENT, agents[i : i + 2], strict=True)] for i in (0, 2)]
        common = ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        started = here.start(
            "ray", "start", "--head", "--num-cpus=0", f"--port={port}", f"--temp-dir={first}",
            "--include-dashboard=false", *own[0], *common, **keeps,
        )  # fmt: skip
        assert started.wait(200) == 0, started.err
        head = Head(started)
        node = here.start(
            "ray", "start", f"--address=127.0.0.1:{port}", "--num-cpus=2", f"--temp-dir={second}", *own[1], *common
        )
        assert node.wait(200) == 0, node.err
        try:
            yield f"127.0.0.1:{port}", second, head
        finally:
            head.end()
            [c.end() for c in here.commands[::-1]]


def test_a_run_steps_on_and_ends_well_while_the_head_is_away_and_the_recovery_from_a_loss_waits_for_it(
    here, lines, nodes, faults
):
    address, directory, head = nodes
    run, overrides = here.path / "run", here.tiny("optim.steps=100000", "run_dir=run", "snapshot.every=2")
    three = ["cluster.ranks=3", "cluster.cpus_per_rank=0.5"]
    script = [*overrides, *three, "eval.every=0", "exchange.kind=flat", "checkpoint.every_minutes=0"]
    script.append("elastic.wait_s=0")  # nobody comes in place of the lost one
    command = here.start("python", "-c", DRIVER, address, directory, "train", *script)

    def done():
        return len(lines(run / "metrics.jsonl"))

    def ranks():
        return [pid for pid, line in here.commands[1].offspring().items() if line.startswith("ray::RankActor")]

    command.until(lambda: done() >= 5, 200, "five steps")
    assert len(ranks()) == 3
    head.kill()
    time.sleep(1)
    before = done()
    command.until(lambda: done() >= before + 5, 200, "five steps without the head")
    late = ranks()[0]
    os.kill(late, signal.SIGSTOP)  # less than cluster.silence_s: it is asked after, not lost
    time.sleep(3)
    os.kill(late, signal.SIGCONT)
    before = done()
    command.until(lambda: done() >= before + 5, 200, "five steps after a rank was late, still without the head")
    os.kill(ranks()[0], signal.SIGKILL)
    time.sleep(5)
    assert "event kind=recovered" not in command.err, "the others need the head to find each other"
    head.start()
    command.until(lambda: "event kind=recovered" in command.err, 200, "the recovery")
    before = done()
    command.until(lambda: done() >= before + 5, 200, "five steps of the ranks that are left")
    head.kill()  # once more: nobody but the driver ends the ranks then
    command.process.send_signal(signal.SIGINT)
    assert command.wait(200) == 130, command.err
    limit = time.monotonic() + 10
    while ranks() and time.monotonic() < limit:  # they are on their way
        time.sleep(0.1)
    assert ranks() == []
    assert (run / "checkpoints" / f"step-{lines(run / 'metrics.jsonl')[-1]['step']:06d}" / "manifest.json").exists()
