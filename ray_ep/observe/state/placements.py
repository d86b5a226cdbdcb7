"""The placements of a run: every version with its cause, what moved between two, and why an expert sits where it does.

Ranks are numbered anew when some come or go, so what moved is told by members. L MoE layers, E experts, R ranks,
S slots. Imports NumPy and the placement.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.observe.state.files import Mark, mark_of
from ray_ep.placement.placement import Ints, Placement, files_by_version

MOST_VERSIONS = 2000
"""Versions that are listed, the newest; the files of older ones stay readable."""
MOST_MOVED = 2000
"""Experts that are listed for one change, of more their number alone."""
CACHED = 16
"""Placements that are kept in memory."""

_WIDTH = 1 << 24  # more members than a run ever has


@dataclass(frozen=True, slots=True)
class Moved:
    """One expert of one layer that sits elsewhere in the second of two placements.

    Args:
        before, after: members that hold it. owner_before, owner_after: of them the one with the master weights.
    """

    layer: int
    expert: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    owner_before: str
    owner_after: str


@dataclass(frozen=True, slots=True)
class Version:
    """One placement in the order in which the run had them: its file, the members of its ranks, what was said of it."""

    number: int
    mark: Mark
    members: tuple[str, ...]
    said: int  # number of the event that told of it; -1: none did


class Placements:
    """The files of a run's folder `placements`, and what the run said of them.

    Attributes:
        newest: the placement that the run has now; None: there is none that can be read.
        moved: experts that moved in each version, by its number; of the first: none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.newest: Placement | None = None
        self.moved: dict[int, int] = {}
        self._there: dict[int, tuple[Path, Mark]] = {}
        self._folded: list[Version] = []
        self._since: Ints | None = None  # [L, E] version that put each expert where it is
        self._cache: OrderedDict[tuple[int, Mark], Placement | None] = OrderedDict()

    def changed(self) -> bool:
        """Look again; whether there are other files than before."""
        there = {}
        for path in files_by_version(self.folder):
            mark = mark_of(path)
            if mark is not None and path.stem.isascii() and path.stem.isdigit():
                there[int(path.stem)] = path, mark
        if there == self._there:
            return False
        self._there = there
        return True

    def fold(self, told: dict[int, tuple[int, tuple[str, ...]]]) -> None:
        """Take on what changed.

        Args:
            told: of versions that the run told of, the number of the event and the members of their ranks. A newer one
                is being moved to: it counts once it is told of. Empty: an older run, whose files alone tell.
        """
        last = max(told, default=None)
        versions = [
            Version(number, mark, tuple(told[number][1]) if number in told else (), told.get(number, (-1,))[0])
            for number, (_, mark) in sorted(self._there.items())
            if last is None or number <= last
        ]
        if versions[: len(self._folded)] != self._folded:  # a run that was resumed may write one again
            self._folded, self._since, self.newest, self.moved = [], None, None, {}
        for version in versions[len(self._folded) :]:
            self._add(version)
            self._folded.append(version)

    @property
    def numbers(self) -> list[int]:
        """Versions that can be read, ascending; the newest of very many."""
        return [version.number for version in self._folded if version.number in self.moved][-MOST_VERSIONS:]

    def read(self, number: int) -> Placement | None:
        """A version; None: it is not there, or cannot be read."""
        if number not in self._there:
            return None
        path, mark = self._there[number]
        key = number, mark
        if key not in self._cache:
            try:
                self._cache[key] = Placement.load(path)
            except PlacementError:
                self._cache[key] = None
        self._cache.move_to_end(key)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return self._cache[key]

    def members(self, number: int) -> tuple[str, ...]:
        """[R] members of the ranks of a version; () where nobody said so."""
        return next((v.members for v in self._folded if v.number == number), ())

    def since(self, layer: int, expert: int) -> int | None:
        """The version that put an expert where it is; None: there is no such expert."""
        since = self._since
        if since is None or not (0 <= layer < since.shape[0] and 0 <= expert < since.shape[1]):
            return None
        return int(since[layer, expert])

    @property
    def since_all(self) -> Ints | None:
        """[L, E] `since` of every expert; None: there is no placement."""
        return self._since

    def between(self, first: int, second: int) -> list[Moved]:
        """Experts that sit elsewhere in the second version, by layer and expert; [] where one cannot be read."""
        old, new = self.read(first), self.read(second)
        if old is None or new is None or not _alike(old, new):
            return []
        names = [_names(p, self.members(n)) for p, n in ((old, first), (new, second))]
        layers, experts = np.nonzero(_elsewhere(old, new, *names))
        return [
            Moved(layer, expert, *_sits(old, names[0], new, names[1], layer, expert))
            for layer, expert in zip(layers.tolist(), experts.tolist(), strict=True)
        ]

    def _add(self, version: Version) -> None:
        new = self.read(version.number)
        if new is None:
            return
        old, since = self.newest, self._since
        if old is None or since is None or not _alike(old, new):
            self._since = np.full((new.num_layers, new.num_experts), version.number, np.int64)
            self.moved[version.number] = 0
        else:
            before = next(v for v in reversed(self._folded) if v.number in self.moved)
            elsewhere = _elsewhere(old, new, _names(old, before.members), _names(new, version.members))
            self._since = np.where(elsewhere, version.number, since)
            self.moved[version.number] = int(elsewhere.sum())
        self.newest = new


def _alike(old: Placement, new: Placement) -> bool:
    return (old.num_layers, old.num_experts) == (new.num_layers, new.num_experts)


def _names(placement: Placement, members: Sequence[str]) -> list[str]:
    """[R] members, or the ranks' numbers where nobody said who they are."""
    if len(members) == placement.num_ranks:
        return list(members)
    return [f"rank-{rank}" for rank in range(placement.num_ranks)]


def _elsewhere(old: Placement, new: Placement, before: list[str], after: list[str]) -> np.ndarray:
    """[L, E] whether others hold an expert, or another one owns it."""
    number = {name: i for i, name in enumerate(dict.fromkeys([*before, *after]))}
    ids = [np.array([number[name] for name in names], np.int64) for names in (before, after)]
    differs = np.setxor1d(_seats(old, ids[0]), _seats(new, ids[1])) // _WIDTH
    found = ids[0][old.owner] != ids[1][new.owner]
    found.reshape(-1)[differs] = True
    return np.asarray(found)


def _seats(placement: Placement, ids: Ints) -> Ints:
    """One number for each expert of a layer on one member."""
    layer, rank, slot = np.nonzero(placement.slots >= 0)
    cell = layer * placement.num_experts + placement.slots[layer, rank, slot]
    return np.asarray(cell * _WIDTH + ids[rank], np.int64)


def _sits(
    old: Placement, before: list[str], new: Placement, after: list[str], layer: int, expert: int
) -> tuple[tuple[str, ...], tuple[str, ...], str, str]:
    held = [tuple(names[r] for r in p.ranks_of(layer, expert)) for p, names in ((old, before), (new, after))]
    owners = [names[int(p.owner[layer, expert])] for p, names in ((old, before), (new, after))]
    return held[0], held[1], owners[0], owners[1]
