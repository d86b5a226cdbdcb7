"""Which fault comes when, and whom it hits: drawn from a seed before anything runs. Pure."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ray_ep.errors import BadInput


class Kind(Enum):
    """A kind of fault; the value is its name on the command line."""

    KILL = "kill"  # SIGKILL of a rank's process
    NODE = "node"  # a raylet is killed, and its ranks with it
    STOP = "stop"  # SIGSTOP of a rank: for half of cluster.silence_s, or for twice
    CUT = "cut"  # a host's cable is pulled: nothing is reset, nothing arrives
    SLOW = "slow"  # a host's links have a part of their bandwidth for a while
    DRAIN = "drain"  # Ray is told that a node will go
    ADD = "add"  # the cluster gets a node more


DEADLY = frozenset({Kind.KILL, Kind.NODE, Kind.CUT})
"""Kinds after which ranks are lost, whatever happens."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule.

    Args:
        at: seconds after the run's first step.
        pick: in [0, 1), whom it hits of those that are there then.
        strength: in [0, 1): a stop is a long one from 0.5 on.
    """

    number: int
    kind: Kind
    at: float
    pick: float
    strength: float

    @property
    def long(self) -> bool:
        """Whether a stopped rank is stopped until it counts as lost."""
        return self.strength >= 0.5

    @property
    def deadly(self) -> bool:
        """Whether ranks are lost by it, if all goes as it should."""
        return self.kind in DEADLY or (self.kind is Kind.STOP and self.long)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be tried.

    Args:
        seconds: that faults are injected for. every_s: mean time between two.
        tolerance: largest relative difference of losses that passes.
    """

    kinds: tuple[Kind, ...]
    seconds: float
    every_s: float
    seed: int
    tolerance: float


def kinds_of(text: str, impossible: Mapping[Kind, str]) -> tuple[Kind, ...]:
    """The kinds that a list such as "kill,node" names, each once.

    Args:
        impossible: why each kind that cannot be had is not there.

    Raises:
        BadInput: an unknown name, none at all, or a fault that is not possible here.
    """
    names = {kind.value: kind for kind in Kind}
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise BadInput(f"--faults={text}: expected one or several of {', '.join(names)}, such as kill,node")
    for word in words:
        if word not in names:
            near = difflib.get_close_matches(word, names, 1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise BadInput(f"--faults: unknown fault {word!r}{hint}; allowed: {', '.join(names)}")
        if why := impossible.get(names[word]):
            raise BadInput(f"--faults: {word} is not possible here: {why}")
    return tuple(dict.fromkeys(names[word] for word in words))


def schedule(wish: Wish) -> tuple[Fault, ...]:
    """One fault every `every_s` seconds on average, half of that apart at least, as often of one kind as of another.

    The same wish gives the same faults; a longer schedule begins as a shorter one.
    """
    kinds, every_s = wish.kinds, wish.every_s
    draw = random.Random(f"{wish.seed} {','.join(k.value for k in kinds)} {every_s}")
    faults: list[Fault] = []
    deck: list[Kind] = []
    while True:
        deck = deck or draw.sample(kinds, len(kinds))
        at = every_s * (len(faults) + draw.uniform(0.25, 0.75))
        if at > wish.seconds:
            return tuple(faults)
        faults.append(Fault(len(faults), deck.pop(), at, draw.random(), draw.random()))


def counted(kinds: Iterable[Kind]) -> dict[str, int]:
    """{name: how often}, in the order of `Kind`."""
    there = list(kinds)
    return {kind.value: there.count(kind) for kind in Kind if kind in there}
