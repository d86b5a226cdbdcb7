"""cluster/local on this machine: it grows for a run and shrinks after it, gives way to a notice, and leaves nothing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster_files.shell import CLUSTER

SCRIPT = CLUSTER / "local" / "cluster.sh"
HOLD = """
import os, sys, time, ray
from ray._private.state import state
from ray.util import placement_group, remove_placement_group
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
room = placement_group([{"CPU": 1}])
ray.get(room.ready(), timeout=120)
print("ready", flush=True)
while not (draining := state.get_draining_nodes()):
    time.sleep(0.1)
print(*draining, flush=True)
remove_placement_group(room)
"""


REFUSE = """
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

class Refuse(FakeMultiNodeProvider):
    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        if tags["ray-user-node-type"] == "spot":
            raise RuntimeError("InsufficientInstanceCapacity")
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
"""
ASK = """
import os, sys, ray
from ray.util import placement_group
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
waiting = [placement_group([{"CPU": 1}]).ready()]
for line in sys.stdin:
    ready, _ = ray.wait(waiting, timeout=float(line))
    have = [n["Labels"]["ray.io/market-type"] for n in ray.nodes() if n["Resources"].get("CPU")]
    print(have if ready else "", flush=True)
"""
MACHINES = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
print(sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in ray.nodes()))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(directory):
    """Whoever was started with `directory` in its environment, or names it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            told = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
            found += [int(path.name)] if str(directory).encode() in told else []
    return sorted({*found} - {os.getpid()})


@pytest.fixture
def directory():
    """A short path: sockets lie deep in it."""
    path = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    yield path
    for pid in processes(path):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(path, ignore_errors=True)


def joined(directory, port, script=SCRIPT, **more):
    """(environment of whoever calls the script, that of a shell that has joined its cluster)."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST"))}
    own |= {"PATH": path, "RAY_EP_LOCAL": str(directory), "RAY_EP_LOCAL_PORT": str(port), **more}
    subprocess.run([script, "start"], env=own, check=True, stdout=subprocess.DEVNULL, timeout=120)
    shell = 'eval "$("$0" env)"; exec env --null'
    printed = subprocess.run(["bash", "-c", shell, script], env=own, check=True, capture_output=True, timeout=60).stdout
    return own, dict(line.split("=", 1) for line in printed.decode().rstrip("\0").split("\0"))


def call(env, *words, **more):
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_on_this_machine_grows_for_a_run_gives_way_to_a_notice_and_leaves_nothing(directory, tmp_path):
    own, env = joined(directory, free_port())
    assert "no active nodes" in call(env, "ray", "status")

    small = ["optim.steps=3", "batch.sequences=4", "batch.length=16", "data.max_bytes=200000", "eval.every=0"]
    run = ["ray-ep", "train", "cluster.ranks=3", f"run_dir={tmp_path / 'run'}", *small, "topology.measure=false"]
    assert "on 3 ranks of 3 node(s)" in call(env, *run)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m][-1] == 3
    until = time.monotonic() + 60
    while "no active nodes" not in (status := call(env, "ray", "status")) or "1 node_" not in status:
        assert time.monotonic() < until, status
        time.sleep(1)

    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout.readline() == "ready\n"
        drain = [sys.executable, CLUSTER / "machine.py", "drain", f"--address={env['RAY_ADDRESS']}", "--seconds=60"]
        began = time.monotonic()
        said = call(env, *drain)
        assert time.monotonic() - began < 30  # it came back as the node went, not at the end of its time
        node = holder.stdout.readline().strip()
        assert f"draining node {node}" in said

    refused = subprocess.run([SCRIPT, "start"], env=own, timeout=60, capture_output=True, text=True)
    assert (refused.returncode, "is running" in refused.stderr) == (2, True)
    subprocess.run([SCRIPT, "stop"], env=own, check=True, timeout=120)
    assert processes(directory) == []
    assert not directory.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_where_spot_machines_are_refused_others_come(directory, tmp_path):
    """Without fallback.py none comes: once Ray turns to another type by itself, it is not needed any more."""
    shutil.copytree(CLUSTER / "local", tmp_path / "local")
    shutil.copy(CLUSTER / "ray.env", tmp_path)
    (tmp_path / "refuse.py").write_text(REFUSE)
    config = tmp_path / "local" / "autoscaler.yaml"
    config.write_text(re.sub(r"^  module: .*", "  module: refuse.Refuse", config.read_text(), flags=re.M))
    script = tmp_path / "local" / "cluster.sh"
    own, env = joined(directory, free_port(), script, PYTHONPATH=str(tmp_path))

    ask = subprocess.Popen(
        [sys.executable, "-c", ASK],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def market_of_what_came(within_s):
        print(within_s, file=ask.stdin, flush=True)
        return ask.stdout.readline().strip()

    with ask:
        assert market_of_what_came(within_s=8) == ""
        words = ["--config", directory / "autoscaler.yaml", "--address", env["RAY_ADDRESS"], "--poll-s", "1"]
        helper = subprocess.Popen([sys.executable, CLUSTER / "fallback.py", *words], env=env)
        try:
            assert market_of_what_came(within_s=90) == "['on-demand']"
        finally:
            helper.kill()
            helper.wait()
        ask.stdin.close()
    subprocess.run([script, "stop"], env=own, check=True, timeout=120)


def test_what_cannot_be_is_said(tmp_path):
    own = {"PATH": os.environ["PATH"], "RAY_EP_LOCAL": str(tmp_path)}
    for verb, says in (("stop", "no cluster in"), ("env", "no cluster in"), ("strat", "usage:")):
        done = subprocess.run([SCRIPT, verb], env=own, capture_output=True, text=True, timeout=60)
        assert (done.returncode, says in done.stderr) == (2, True), verb
    assert tmp_path.exists()


def told(run):
    """What a run says of each step."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_grows_from_one_rank_to_three_and_shrinks_to_two_with_the_losses_of_a_fixed_one(directory, tmp_path):
    (tmp_path / "text.txt").write_text("".join(p.read_text() for p in sorted(CLUSTER.parent.glob("docs/*.md"))))
    steady = ["batch.sequences=8", "batch.length=16", f"data.files=[{tmp_path / 'text.txt'}]", "eval.every=0",
              "optim.schedule=constant_with_warmup", "balance.in_step=off", "topology.measure=false"]  # fmt: skip
    fixed, run = tmp_path / "fixed", tmp_path / "run"
    own, env = joined(directory, free_port())
    call(own, "ray-ep", "train", f"run_dir={fixed}", "cluster.ranks=1", "optim.steps=40", *steady)
    command = ["ray-ep", "train", f"run_dir={run}", "cluster.ranks=1", "elastic.max_ranks=3", "optim.steps=100000"]
    with subprocess.Popen([*command, *steady], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:

        def until(ready, what):
            limit = time.monotonic() + 150
            while not ready():
                assert job.poll() is None, what
                assert time.monotonic() < limit, what
                time.sleep(0.2)

        def on(ranks):
            until(lambda: [m["world_size"] for m in told(run)][-2:] == [ranks] * 2, f"{ranks} ranks")

        def machines():
            return int(call(env, sys.executable, "-c", MACHINES).split()[0])

        try:
            on(1)
            assert machines() == 1
            call(env, "ray-ep", "scale", str(run), "3")
            on(3)
            assert machines() == 3
            call(env, "ray-ep", "scale", str(run), "2")
            on(2)
            until(lambda: machines() == 2, "a machine less")
            job.send_signal(signal.SIGINT)
            assert job.wait(200) == 130
        finally:
            job.kill()
    curve, want = ({m["step"]: m for m in told(where)} for where in (run, fixed))
    assert [m["step"] for m in told(run)] == list(range(1, len(curve) + 1))  # no step was made again
    for step in curve.keys() & want.keys():
        assert curve[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-5), step
    subprocess.run([SCRIPT, "stop"], env=own, check=True, timeout=120)
