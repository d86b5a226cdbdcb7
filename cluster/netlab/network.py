"""A lab's network namespaces and links, by `ip` and `tc`: made, shaped, cut, measured and removed. Knows no Ray."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import BAD_INPUT, SWITCH, Lab, LabError, bandwidth


def call(*command: str) -> str:
    """Run a system command; its output.

    Raises:
        LabError: it failed; with its own words.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def namespaces(lab: Lab) -> list[str]:
    """Those of this lab that are there, the switch last: while it is there the lab counts as up."""
    names = [line.split()[0] for line in call("ip", "netns", "list").splitlines() if line]
    mine = [n for n in names if n.startswith(lab.namespace(""))]
    return sorted(mine, key=lambda n: n == lab.namespace(SWITCH))


def is_up(lab: Lab) -> bool:
    """Whether the lab's switch is there."""
    return lab.namespace(SWITCH) in namespaces(lab)


def make_network(lab: Lab) -> None:
    """Hosts, switch, links and their rates; the switch's namespace is there already."""
    switch = lab.namespace(SWITCH)
    call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    call("ip", "-n", switch, "link", "set", "bridge", "up")
    for host in lab.hosts:
        inside = lab.namespace(host.name)
        call("ip", "netns", "add", inside)
        # The host's end gets its name where it is: the switch's namespace has a port of each host, named after it.
        call(
            "ip", "-n", switch, "link", "add", f"p-{host.name}", "type", "veth", "peer", "name", "eth0", "netns", inside
        )
        call("ip", "-n", switch, "link", "set", f"p-{host.name}", "master", "bridge", "up")
        call("ip", "-n", inside, "link", "set", "lo", "up")
        call("ip", "-n", inside, "addr", "add", f"{lab.address(host.name)}/24", "dev", "eth0")
        call("ip", "-n", inside, "link", "set", "eth0", "up")
        # Without `default` what no filter names (ARP) passes unshaped.
        call("tc", "-n", inside, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb")
    for source, target in lab.pairs():
        _set_class("add", lab, source, target, lab.rates[source, target])
        match = ("protocol", "ip", "u32", "match", "ip", "dst", f"{lab.address(target)}/32")
        inside = lab.namespace(source)
        call("tc", "-n", inside, "filter", "add", "dev", "eth0", "parent", "1:", *match, "flowid", lab.class_id(target))


def _set_class(verb: str, lab: Lab, source: str, target: str, bits: int) -> None:
    # 5 ms of burst, so that a busy machine's late timers do not slow the link. Quantum only silences a warning: it says
    # how classes share what they borrow, and these borrow nothing.
    burst = str(max(16_000, bits // 8 // 200))
    shape = ("htb", "rate", f"{bits}bit", "burst", burst, "cburst", burst, "quantum", "15140")
    where = ("dev", "eth0", "parent", "1:", "classid", lab.class_id(target))
    call("tc", "-n", lab.namespace(source), "class", verb, *where, *shape)


def rates_now(lab: Lab) -> dict[tuple[str, str], int]:
    """The rates in bit/s that tc has now."""
    found: dict[tuple[str, str], int] = {}
    for source in lab.hosts:
        # Parsed as text: Debian 12's tc answers -j with text here.
        text = call("tc", "-n", lab.namespace(source.name), "class", "show", "dev", "eth0")
        rates = {m[1]: m[2] for m in re.finditer(r"^class htb (\S+) .*? rate (\S+) ", text, re.M)}
        for target in lab.hosts:
            if target != source:
                found[source.name, target.name] = bandwidth(rates[lab.class_id(target.name)], "tc")
    return found


def remove(lab: Lab, switch: bool = True) -> None:
    """Kill what runs in the lab's namespaces and remove them and the lab's files; does nothing where nothing is.

    Signals wait until it is done: a second, impatient Ctrl-C leaves nothing behind either. Two at once are no matter.

    Args:
        switch: the switch's namespace, too.

    Raises:
        LabError: a process does not die, or a namespace stays.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        there = namespaces(lab)
        if switch and not there:  # a machine that was started anew has forgotten them, its /tmp perhaps not
            shutil.rmtree(lab.folder, ignore_errors=True)
        for name in there[: None if switch else -1]:
            end_processes(name)
            if name == lab.namespace(SWITCH):  # the last; once it has gone, the next lab of this name may come
                shutil.rmtree(lab.folder, ignore_errors=True)
            with contextlib.suppress(LabError):  # another `down` was faster
                call("ip", "netns", "del", name)
            if name in namespaces(lab):
                raise LabError(f"could not remove namespace {name}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_processes(name: str) -> None:
    """End every process of a namespace, also those that start meanwhile. Raises LabError if one does not die."""
    limit = time.monotonic() + 20
    while pids := _processes(name):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > limit:
            raise LabError(f"processes {pids} in {name} do not die of SIGKILL; try `down` again")
        time.sleep(0.05)


def _processes(name: str) -> list[int]:
    try:
        return [int(pid) for pid in call("ip", "netns", "pids", name).split()]
    except LabError:  # the namespace has gone meanwhile
        return []


def shape(lab: Lab, source: str, target: str, bits: int, one_way: bool) -> None:
    """Give a link of a running lab another bandwidth (bit/s), in both directions if not told otherwise.

    Raises:
        LabError: the hosts are not two of the lab's.
    """
    both = [(source, target), (target, source)]
    lab.address(source), lab.address(target)
    if source == target:
        raise LabError(f"{source} to {target}: a link joins two hosts; inside a host nothing is shaped", BAD_INPUT)
    for a, b in both[: 2 - one_way]:
        _set_class("change", lab, a, b, bits)


def connect(lab: Lab, host: str, state: str) -> None:
    """Set a host's link up or down: what it and others sent is lost silently, as with a cable that was pulled."""
    lab.address(host)
    call("ip", "-n", lab.namespace(SWITCH), "link", "set", f"p-{host}", state)


def is_cut(lab: Lab, host: str) -> bool:
    """Whether a host's link is down."""
    text = call("ip", "-n", lab.namespace(SWITCH), "-o", "link", "show", f"p-{host}")
    return "UP" not in text.partition("<")[2].partition(">")[0].split(",")


def measure(lab: Lab, source: str, target: str, seconds: float) -> float:
    """Bit/s of payload that one TCP connection from source to target moves now: 4% below the link's, for headers.

    Raises:
        LabError: the target does not answer.
    """
    program = str(Path(__file__).with_name("transfer.py"))
    to, of = (["ip", "netns", "exec", lab.namespace(h), sys.executable, program] for h in (target, source))
    with subprocess.Popen([*to, "receive", str(seconds)], stdout=subprocess.PIPE, text=True) as receiver:
        try:
            port = receiver.stdout.readline().strip()
            call(*of, "send", lab.address(target), port)
            return float(receiver.stdout.readline())
        finally:
            receiver.kill()
