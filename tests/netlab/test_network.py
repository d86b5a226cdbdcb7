"""Hosts and links as the kernel makes them: bandwidths by real transfers, cuts, teardown. Without Ray."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import command, labs, left, needs_root, netlab, network, processes

pytestmark = needs_root

LINKS = {
    "default": "80mbit",
    "pairs": [
        {"from": "h0", "to": "h1", "bandwidth": "20mbit"},
        {"from": "h1", "to": "h0", "bandwidth": "50mbit"},
        {"between": ["h0", "h2"], "bandwidth": "120mbit"},
        {"from": "h2", "to": "h1", "bandwidth": "10mbit"},
    ],
}


@pytest.fixture(scope="module")
def three(make_lab):
    """A running lab of three hosts and no Ray: (path, Lab)."""
    path, lab = make_lab(3, LINKS)
    netlab("up", path, "--no-ray")
    return path, lab


def close_to(bits):
    """Within 20% of a link's bit/s; payload is 4% below what the link carries."""
    return pytest.approx(bits, rel=0.2)


@pytest.mark.slow
def test_each_link_moves_what_the_lab_says(three):
    _, lab = three
    assert len(set(lab.rates.values())) >= 4
    assert {pair: network.measure(lab, *pair, 1.0) for pair in lab.pairs()} == {
        pair: close_to(bits) for pair, bits in lab.rates.items()
    }


def test_links_of_a_host_do_not_take_from_each_other(three):
    _, lab = three
    pairs = [("h0", "h1"), ("h0", "h2")]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda pair: network.measure(lab, *pair, 1.0), pairs))
    assert found == [close_to(lab.rates[pair]) for pair in pairs]


@pytest.mark.slow
def test_a_link_changes_while_a_transfer_runs_over_it(three):
    path, lab = three
    with ThreadPoolExecutor() as pool:
        before = pool.submit(network.measure, lab, "h1", "h2", 3.0)
        time.sleep(0.5)
        netlab("shape", path, "h1", "h2", "16mbit")
        slowed = before.result()
    assert slowed < 0.6 * lab.rates["h1", "h2"]
    assert network.measure(lab, "h1", "h2", 1.0) == close_to(16e6)
    assert network.rates_now(lab)["h2", "h1"] == 16_000_000
    netlab("shape", path, "h1", "h2", "40mbit", "--one-way")
    assert network.measure(lab, "h1", "h2", 1.0) == close_to(40e6)
    assert network.rates_now(lab)["h2", "h1"] == 16_000_000


@pytest.mark.slow
def test_a_host_that_is_cut_is_silent_until_it_is_healed(three):
    path, lab = three
    netlab("cut", path, "h2")
    assert "cut" in netlab("show", path)[0]
    with pytest.raises(labs.LabError):
        network.measure(lab, "h0", "h2", 0.2)
    assert network.measure(lab, "h0", "h1", 1.0) == close_to(lab.rates["h0", "h1"])
    netlab("heal", path, "h2")
    assert network.measure(lab, "h0", "h2", 1.0) == close_to(lab.rates["h0", "h2"])


def test_what_a_running_lab_refuses_is_said(three):
    path, _ = three
    assert "is up already" in netlab("up", path, status=1)[1]
    assert "no host 'h7'; allowed: h0, h1, h2" in netlab("cut", path, "h7", status=2)[1]
    assert "no host 'h7'" in netlab("exec", path, "--host", "h7", "--", "true", status=2)[1]
    assert "joins two hosts" in netlab("shape", path, "h0", "h0", "1mbit", status=2)[1]
    assert "bandwidth 'fast'" in netlab("shape", path, "h0", "h1", "fast", status=2)[1]


def test_two_labs_live_side_by_side_and_leave_one_by_one(three, make_lab):
    _, first = three
    path, second = make_lab(2, {"default": "30mbit"})
    netlab("up", path, "--no-ray")
    assert network.measure(second, "h0", "h1", 1.0) == close_to(30e6)
    netlab("down", path)
    assert left(second) == []
    assert network.is_up(first)
    assert "is not up" in netlab("show", path, status=1)[1]


def test_down_removes_what_runs_in_a_lab_whoever_started_it_and_may_be_repeated(make_lab):
    path, lab = make_lab(2, {})
    netlab("up", path, "--no-ray")
    inside = subprocess.Popen(command("exec", path, "--host", "h1", "--", "sleep", "600"))
    _await(lambda: "sleep 600" in processes(lab).values())
    with ThreadPoolExecutor() as pool:  # two at once are no matter
        list(pool.map(lambda _: netlab("down", path), range(2)))
    assert inside.wait(10) == 137  # killed, as a shell says it
    assert left(lab) == []
    netlab("down", path)


def test_run_passes_the_exit_status_on_and_leaves_nothing(make_lab):
    path, lab = make_lab(2, {})
    said, _ = netlab("run", path, "--no-ray", "--", "sh", "-c", "echo $NETLAB $RAY_ADDRESS; exit 7", status=7)
    assert said.split() == [lab.name, f"{lab.address('h0')}:6379"]
    assert left(lab) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_run_that_is_told_to_stop_leaves_nothing(make_lab, number):
    path, lab = make_lab(2, {})
    process = subprocess.Popen(command("run", path, "--no-ray", "--", "sleep", "600"), start_new_session=True)
    _await(lambda: "sleep 600" in processes(lab).values())
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert left(lab) == []


def test_run_keeps_the_lab_when_asked(make_lab):
    path, lab = make_lab(2, {})
    netlab("run", path, "--no-ray", "--keep", "--", "true")
    assert network.is_up(lab)
    netlab("down", path)
    assert left(lab) == []


def test_of_two_that_bring_the_same_lab_up_one_is_refused(make_lab):
    path, lab = make_lab(2, {})
    both = [subprocess.Popen(command("up", path, "--no-ray"), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate(timeout=30)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert sum("is up already" in w for w in words) == 1
    assert network.measure(lab, "h0", "h1", 0.2) > 0


def test_up_removes_what_a_broken_teardown_left(make_lab):
    path, lab = make_lab(2, {})
    netlab("up", path, "--no-ray")
    network.call("ip", "netns", "del", lab.namespace("switch"))
    (lab.folder / "of-an-earlier-lab").touch()
    netlab("up", path, "--no-ray")
    assert network.measure(lab, "h0", "h1", 0.2) > 0
    assert list(lab.folder.iterdir()) == []


def test_down_removes_files_of_a_lab_that_a_reboot_ended(make_lab):
    path, lab = make_lab(2, {})
    lab.folder.mkdir()
    netlab("down", path)
    assert left(lab) == []


def _await(condition, limit_s=20.0):
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
