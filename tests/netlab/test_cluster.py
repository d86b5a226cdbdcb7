"""A Ray cluster over a lab's hosts: actors on each exchange over the shaped links; nothing is left after a crash."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import command, left, needs_root, netlab, processes

pytestmark = [needs_root, pytest.mark.slow]


def test_actors_of_two_hosts_exchange_over_the_link_and_a_crash_leaves_nothing_after_down(make_lab, tmp_path):
    path, lab = make_lab(2, {"default": "200mbit"})
    program, ended = Path(__file__).with_name("exchange.py"), tmp_path / "ended"
    script = f"{sys.executable} {program}; echo $? > {ended}; echo; sleep 600"
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(
            command("run", path, "--", "sh", "-c", script), stdout=subprocess.PIPE, stderr=err, text=True
        )
    line = process.stdout.readline()
    process.stdout.readline()
    assert ended.read_text().strip() == "0", (tmp_path / "err").read_text()

    results = json.loads(line)
    assert {address for address, _, _ in results} == {lab.address("h0"), lab.address("h1")}
    assert [values for _, values, _ in results] == [[[0], [10]], [[1], [11]]]
    assert all(1_000_000 < sent < 2_000_000 for _, _, sent in results)  # the 1 MB for the other, over its interface

    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert any("raylet" in line for line in processes(lab).values())
    assert "is up already" in netlab("up", path, status=1)[1]
    netlab("down", path)
    assert left(lab) == []
