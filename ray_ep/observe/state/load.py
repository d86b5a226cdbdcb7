"""Where the tokens of a run went: loads of experts and ranks, bytes between ranks, co-activation and transitions.

Loads come from `statistics/load-NNNN.npz`, one for each placement, which the driver keeps up to date; co-activation and
transitions from `statistics/routing.npz`, written with each checkpoint, and before the first one from
`statistics/sample.npz`, a sample of recent tokens. L MoE layers, E experts, R ranks. NumPy and the placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.errors import PlacementError
from ray_ep.observe.state.files import Mark, mark_of, plain, read_arrays
from ray_ep.placement.statistics import RoutingStatistics

_RECENT = ("load", "recent", "ranks", "sent", "steps", "recent_steps", "recent_seconds")
_PAIRS = ("coactivation", "transitions")


class Load:
    """The folder `statistics` of a run.

    Attributes:
        load: [L, E] tokens that each expert received in the whole run, as of the last checkpoint; None: not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.load: np.ndarray | None = None
        self._routing: Mark | None = None
        self._sample: Mark | None = None
        self._sets: np.ndarray | None = None  # read when somebody asks
        self._pairs: dict[str, np.ndarray] | None = None  # read when somebody asks
        self._windows: dict[int, Mark] = {}
        self._newest: tuple[int, dict[str, np.ndarray]] | None = None

    def changed(self) -> bool:
        """Look again; whether there is anything else than before."""
        routing, sample = (mark_of(self.folder / name) for name in ("routing.npz", "sample.npz"))
        windows = self._there()
        if (routing, sample, windows) == (self._routing, self._sample, self._windows):
            return False
        if sample != self._sample:
            self._sample, self._sets = sample, None
        if routing != self._routing:
            self._routing, self._pairs = routing, None
            load = read_arrays(self.folder / "routing.npz", ("load",)).get("load")
            self.load = load if load is not None and load.ndim == 2 and load.size else None
        self._windows, self._newest = windows, None
        for version in sorted(windows, reverse=True):
            if window := self.window(version):
                self._newest = version, window
                break
        return True

    def window(self, version: int) -> dict[str, np.ndarray]:
        """What was counted under a placement; {}: nothing that can be read.

        Of all its steps (`steps` [2], the first and the last) `load` [L, E] tokens of each expert; of the newest ones
        (`recent_steps`, `recent_seconds`) `recent` [L, E], `ranks` [L, R] tokens that each rank computed and `sent`
        [R, R] bytes from rank to rank.
        """
        if version not in self._windows:
            return {}
        found = read_arrays(self.folder / f"load-{version:04d}.npz", _RECENT)
        load, ranks, sent = (found.get(name, np.zeros(0)) for name in ("recent", "ranks", "sent"))
        fits = load.ndim == 2 and found.get("load", np.zeros(0)).shape == load.shape and ranks.ndim == 2
        fits = fits and sent.shape == (ranks.shape[1], ranks.shape[1]) and len(ranks) == len(load)
        numbers = [found.get(name, np.zeros(0)) for name in ("steps", "recent_steps")]
        fits = fits and all(n.shape == (2,) and np.isfinite(n).all() for n in numbers)
        return found if fits and found.get("recent_seconds", np.zeros(1)).shape == () else {}

    def pairs(self, name: str) -> np.ndarray | None:
        """`coactivation` [L, E, E] or `transitions` [L-1, E, E], as of the last checkpoint; None: not there."""
        if self._pairs is None:
            self._pairs = {} if self.load is None else read_arrays(self.folder / "routing.npz", _PAIRS)
        found = self._pairs.get(name)
        if found is None or self.load is None:
            return None
        layers, experts = self.load.shape
        shape = (layers if name == "coactivation" else layers - 1, experts, experts)
        return found if found.shape == shape else None

    def layer_pairs(self, name: str, layer: int) -> np.ndarray | None:
        """[E, E] of `pairs` in one layer, before the first checkpoint of a sample of recent tokens; None: not known."""
        whole = self.pairs(name)
        if whole is not None:
            return whole[layer] if 0 <= layer < len(whole) else None
        experts, sets = self._experts, self._sampled()
        other = layer + (name == "transitions")
        if experts is None or sets is None or layer < 0 or other >= len(sets):
            return None
        fired = [_one_hot(sets[number], experts) for number in (layer, other)]
        return np.asarray(fired[0].T @ fired[1])

    @property
    def statistics(self) -> RoutingStatistics | None:
        """What a planner plans by: the whole run as of the last checkpoint, which has all of it.

        Before the first one: loads under the newest placement, and the sample of recent tokens. None: nothing was
        counted that can be read.
        """
        try:
            if self.load is not None:
                return RoutingStatistics.load_file(self.folder / "routing.npz")
            if self._newest is not None:
                sets = self._sampled()
                sample = None if sets is None else sets.astype(np.int32)
                return RoutingStatistics(self._newest[1]["load"].astype(np.int64), sample=sample)
        except PlacementError:
            pass
        return None

    @property
    def pairs_of(self) -> str:
        """What `layer_pairs` is counted over: run (until the last checkpoint), recent (a sample); "": nothing."""
        return "run" if self.load is not None else "recent" if self._sample is not None else ""

    @property
    def _experts(self) -> int | None:
        return None if self._newest is None else int(self._newest[1]["load"].shape[1])

    def _sampled(self) -> np.ndarray | None:
        """[L, N, K] expert sets; None: there are none that can be read."""
        if self._sets is None:
            found = read_arrays(self.folder / "sample.npz", ("sample",)).get("sample")
            self._sets = np.zeros((0, 0, 0)) if found is None or found.ndim != 3 else found
        return self._sets if self._sets.size else None

    @property
    def newest(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """(version, `window`) of the newest placement under which anything was counted."""
        return self._newest

    def snapshot(self) -> dict[str, Any]:
        """See the room's docstring."""
        return {
            "run": None if self.load is None else plain(self.load),
            "pairs": self.pairs_of,
            **({} if self._newest is None else _window_of(*self._newest)),
        }

    def _there(self) -> dict[int, Mark]:
        found = {}
        for path in self.folder.glob("load-*.npz"):
            number, mark = path.stem[5:], mark_of(path)
            if mark is not None and number.isascii() and number.isdigit():
                found[int(number)] = mark
        return found


def _one_hot(sets: np.ndarray, experts: int) -> np.ndarray:
    """[N, E] whether a token's set [N, K] has an expert; float32, for products of it are taken."""
    out = np.zeros((len(sets), experts), np.float32)
    tokens, places = np.nonzero((sets >= 0) & (sets < experts))
    out[tokens, sets[tokens, places].astype(np.int64)] = 1.0
    return out


def _window_of(version: int, window: dict[str, np.ndarray]) -> dict[str, Any]:
    """A window as JSON has it."""
    steps, recent = window["steps"], window["recent_steps"]
    return {
        "version": version,
        "steps": [int(n) for n in steps],
        "recent_steps": [int(n) for n in recent],
        "recent_seconds": float(window["recent_seconds"]),
        "experts": plain(window["recent"]),
        "experts_all": plain(window["load"]),
        "ranks": plain(window["ranks"]),
    }


def sent_a_step(window: dict[str, np.ndarray]) -> np.ndarray | None:
    """[R, R] bytes a step from rank to rank in the newest steps; None: not known."""
    if not window:
        return None
    first, last = window["recent_steps"].tolist()
    return np.asarray(window["sent"] / max(last - first + 1, 1))
