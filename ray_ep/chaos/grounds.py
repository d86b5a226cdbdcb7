"""Where a run is disturbed: raylets of its own on this machine, a network lab, or somebody's cluster.

Each is a context manager that says which faults it cannot have, how a command is run there, and lends its agent. What
is done with them is in faults.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ray_ep.chaos.checks import cpus_of
from ray_ep.chaos.processes import Agent, agent, environment, unhurried
from ray_ep.chaos.schedule import Kind
from ray_ep.config.schema import Config
from ray_ep.errors import BadInput, ClusterError

_HEALTH = {  # Ray's own verdict on a lost node after about 3 s in place of 13 to 60
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_NETLAB = Path(__file__).parents[2] / "cluster" / "netlab" / "netlab.py"
_NO_LAB = "links are cut and slowed on a network lab: give --lab LAB.yaml (needs root; cluster/netlab/README.md)"


class Ground(Protocol):
    """A cluster for the time of one run.

    Attributes:
        impossible: why it cannot have some kinds of fault.
        overrides: what the run is told of it.
        env: of commands there.
        in_place: a new node needs the host of a lost one.
        agent: once it is entered.
    """

    impossible: Mapping[Kind, str]
    overrides: Sequence[str]
    env: Mapping[str, str]
    in_place: bool
    agent: Agent

    def __enter__(self) -> Ground:
        """It is there. Raises ClusterError if it cannot be."""

    def __exit__(self, *error: object) -> None:
        """What was started for it is gone."""

    def command(self, words: Sequence[str]) -> list[str]:
        """How a command is run on it."""

    def new_node(self, address: str) -> None:
        """A node in place of one that is lost, which had this address; or one more. It may take seconds."""

    def cut(self, address: str) -> None:
        """Pull the cable of the host with this address."""

    def heal(self, address: str) -> None:
        """Put it back."""

    def slow(self, address: str, part: float) -> None:
        """Give the links of a host this part of the bandwidth that they had at first; 1: all of it."""


class OwnRaylets:
    """Raylets on this machine, each of which Ray takes for a node; the head has no ranks.

    Args:
        nodes: that have room for all ranks together. folder: for logs.
    """

    impossible: Mapping[Kind, str] = {Kind.CUT: _NO_LAB, Kind.SLOW: _NO_LAB}
    in_place = False

    def __init__(self, cfg: Config, nodes: int, folder: Path):
        self._folder = folder
        self._told = {"nodes": nodes, "cpus": cpus_of(cfg, nodes)}
        self.env: Mapping[str, str] = {}
        self.overrides: Sequence[str] = ()

    def __enter__(self) -> OwnRaylets:
        """Ray is up."""
        # Short: sockets lie deep in it. Apart: Ray notes its newest cluster there, which others would join.
        self._files = tempfile.TemporaryDirectory(prefix="ray_ep-", dir="/tmp", ignore_cleanup_errors=True)
        own = {"RAY_TMPDIR": self._files.name, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self.env = environment(_HEALTH | own)
        self.agent = Agent(agent(), self._told, self.env, self._folder / "agent.log")
        try:
            self.agent.__enter__()
        except BaseException:
            self._files.cleanup()
            raise
        self.overrides = [f"cluster.address={self.agent.address}"]
        return self

    def __exit__(self, *error: object) -> None:
        """Ray is gone."""
        self.agent.__exit__()
        self._files.cleanup()

    def command(self, words: Sequence[str]) -> list[str]:
        """As it is."""
        return list(words)

    def new_node(self, address: str) -> None:
        """One raylet more."""
        self.agent.ask("add_node")

    def cut(self, address: str) -> None:
        """Raylets of one host have no cable."""
        raise ClusterError(_NO_LAB)

    heal = cut

    def slow(self, address: str, part: float) -> None:
        """As with a cable."""
        raise ClusterError(_NO_LAB)


class JoinedCluster:
    """Somebody's cluster, on which this machine is a node: ranks are hit, nodes are left alone."""

    _NOT_OURS = "a cluster that was joined has nodes of somebody's: they are not killed, added or cut off from here"
    impossible: Mapping[Kind, str] = dict.fromkeys((Kind.NODE, Kind.ADD, Kind.CUT, Kind.SLOW), _NOT_OURS)
    in_place = False

    def __init__(self, address: str, folder: Path):
        self.overrides: Sequence[str] = [f"cluster.address={address}"]
        self.env: Mapping[str, str] = environment({})
        self.agent = Agent(agent(), {"join": address}, self.env, folder / "agent.log")

    def __enter__(self) -> JoinedCluster:
        """It is joined."""
        self.agent.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """It is left, as it is."""
        self.agent.__exit__()

    def command(self, words: Sequence[str]) -> list[str]:
        """As it is."""
        return list(words)

    def new_node(self, address: str) -> None:
        """Its autoscaler's affair."""

    def cut(self, address: str) -> None:
        """Never."""
        raise ClusterError(self._NOT_OURS)

    heal = cut

    def slow(self, address: str, part: float) -> None:
        """Never."""
        raise ClusterError(self._NOT_OURS)


class NetworkLab:
    """A network lab (cluster/netlab): hosts are namespaces of this machine, whose links can be cut and slowed."""

    impossible: Mapping[Kind, str] = {
        Kind.ADD: "a lab has the hosts that its LAB.yaml names; leave it out, or leave --lab out"
    }
    in_place = True

    def __init__(self, lab: Path, folder: Path):
        self._lab, self._folder = lab, folder
        self.env: Mapping[str, str] = environment({})
        self.overrides: Sequence[str] = ()

    def __enter__(self) -> NetworkLab:
        """Hosts, links and Ray are up."""
        self._netlab("up")
        try:
            told = self._netlab("show")
            self._hosts = {m[2]: m[1] for m in re.finditer(r"^(\S+) +(\d+\.\d+\.\d+\.\d+) ", told, re.M)}
            self._rates = re.findall(r"^ *(\S+) -> (\S+) +(\S+)", told, re.M)
            self._head = next(iter(self._hosts))
            here = self.command([*agent(), "{}"])[:-1]
            self.agent = Agent(here, {"address": f"{self._head}:6379"}, self.env, self._folder / "agent.log")
            self.agent.__enter__()
        except BaseException:
            self._netlab("down")
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """All of it is gone."""
        with unhurried():
            self.agent.__exit__()
            self._netlab("down")

    def command(self, words: Sequence[str]) -> list[str]:
        """Run on the lab's first host."""
        return [sys.executable, str(_NETLAB), "exec", str(self._lab), "--", *words]

    def new_node(self, address: str) -> None:
        """The host's Ray node is started again."""
        self._netlab("start", self._hosts[address])

    def cut(self, address: str) -> None:
        """Nothing that it sends arrives, nothing that is sent to it does."""
        self._netlab("cut", self._hosts[address])

    def heal(self, address: str) -> None:
        """Its link is up again; Ray's node there is not."""
        self._netlab("heal", self._hosts[address])

    def slow(self, address: str, part: float) -> None:
        """What it sends and is sent."""
        host = self._hosts[address]
        for source, target, rate in self._rates:
            if host in (source, target):
                number, unit = re.fullmatch(r"([\d.]+)(\D+)", rate).groups()  # type: ignore[union-attr]
                kbit = float(number) * part * {"kbit": 1, "mbit": 1e3, "gbit": 1e6}[unit]
                self._netlab("shape", source, target, f"{max(kbit, 8):.0f}kbit", "--one-way")

    def _netlab(self, verb: str, *words: str) -> str:
        command = [sys.executable, str(_NETLAB), verb, str(self._lab), *words]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True)
        if done.returncode:
            said = done.stderr.strip().removeprefix("netlab: ") or f"exit status {done.returncode}"
            raise (BadInput if done.returncode == 2 else ClusterError)(f"--lab {self._lab}: {said}")
        return done.stdout


def check_lab(lab: Path) -> None:
    """Raise BadInput where there is no such lab, or no program for labs."""
    if not _NETLAB.is_file():
        raise BadInput(f"--lab {lab}: the network lab is in the source tree only: {_NETLAB} is not there")
    if not lab.is_file():
        raise BadInput(f"--lab {lab}: no such file; cluster/netlab has some")
