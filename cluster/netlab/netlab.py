#!/usr/bin/env python3
"""A Ray cluster of several hosts on one machine, whose links have the bandwidths that a LAB.yaml names.

Each host is a network namespace with one interface (`eth0`) on a switch, a bridge in a namespace of its own: nothing of
a lab is in the machine's own network, so labs run side by side and a teardown that removed the namespaces removed all.
What a host sends to each other host has a class of tc's htb of its own, chosen by a u32 filter on the destination.
Needs root and Debian's iproute2; imports PyYAML and the standard library, and calls `ip`, `tc` and `ray`.

Exit status: 0 done, 1 the lab failed, 2 bad input; `run` and `exec` pass on that of their command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

from lab import Lab, LabError, bandwidth, read_lab, spell
from network import connect, is_cut, is_up, measure, rates_now, remove, shape
from nodes import run_command, running, start_again, up


def show(lab: Lab, seconds: float) -> None:
    """Print hosts and links as they are now; with seconds above 0 also the bandwidth of a transfer over each link."""
    cut = {h.name for h in lab.hosts if is_cut(lab, h.name)}
    for host in lab.hosts:
        state = "cut" if host.name in cut else "up"
        print(f"{host.name:<11} {lab.address(host.name):<15} {host.ranks} ranks, {host.cpus} CPUs  {state}")
    for (source, target), bits in rates_now(lab).items():
        asked = seconds and not {source, target} & cut
        found = f"   measured {spell(measure(lab, source, target, seconds))}" if asked else ""
        print(f"{source:>11} -> {target:<11} {spell(bits):>8}{found}", flush=True)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the command after `--`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="netlab.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str, *names: str) -> argparse.ArgumentParser:
        it = verbs.add_parser(name, help=text, description=text)
        it.add_argument("lab", type=Path, metavar="LAB.yaml")
        [it.add_argument(n) for n in names]
        return it

    make = verb("up", "Make hosts and links and start Ray on each host.")
    run = verb("run", "Bring the lab up, run the COMMAND after -- on its first host, take the lab down.")
    run.add_argument("--keep", action="store_true", help="leave the lab up, to look into it")
    for it in (make, run):
        it.add_argument("--no-ray", action="store_true", help="hosts and links only")
    verb("exec", "Run the COMMAND after -- on a host of a running lab.").add_argument("--host", help="not the first")
    one = verb("shape", "Change the bandwidth of a link of a running lab.", "host1", "host2", "bandwidth")
    one.add_argument("--one-way", action="store_true", help="only what host1 sends to host2")
    verb("cut", "Pull a host's cable: nothing is reset, nothing arrives.", "host")
    verb("heal", "Put a host's cable back.", "host")
    verb("start", "End what runs on a host and start Ray there again, as a new node.", "host")
    it = verb("show", "Hosts and links of a running lab, as they are now.")
    it.add_argument("--measure", type=float, metavar="S", default=0.0, help="transfer over each link for S seconds")
    verb("down", "Kill what runs in the lab and remove it; also what a crash left.")
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if (options.verb in ("run", "exec")) != bool(command):
        parser.error(f"{options.verb}: a COMMAND after -- is for run and exec, which need one")
    return options, command


def dispatch(options: argparse.Namespace, command: list[str]) -> int:
    """Do what a verb says; the exit status."""
    lab = read_lab(options.lab)
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        raise LabError("a network lab needs root, and `ip` and `tc` (Debian: iproute2)")
    if options.verb == "up":
        up(lab, ray=not options.no_ray)
        print(f"lab {lab.name} is up: {len(lab.hosts)} hosts, {sum(h.ranks for h in lab.hosts)} ranks")
    elif options.verb == "run":
        with running(lab, options.keep, ray=not options.no_ray):
            return run_command(lab, lab.head.name, command)
    elif options.verb == "down":
        remove(lab)
    elif not is_up(lab):
        raise LabError(f"lab {lab.name} is not up")
    elif options.verb == "exec":
        host = options.host or lab.head.name
        lab.address(host)
        return run_command(lab, host, command)
    elif options.verb == "shape":
        bits = bandwidth(options.bandwidth, "shape")
        shape(lab, options.host1, options.host2, bits, options.one_way)
    elif options.verb == "show":
        show(lab, options.measure)
    elif options.verb == "start":
        start_again(lab, options.host)
    else:
        connect(lab, options.host, {"cut": "down", "heal": "up"}[options.verb])
    return 0


def main() -> int:
    """Entry of the program."""
    options, command = parse(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):  # as exceptions, so that what was begun is taken away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return dispatch(options, command)
    except LabError as e:
        print(f"netlab: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
