"""The state of one run: its files, looked at again on `refresh`, and what they say as one tree.

Each kind of file has a reader of its own beside this; the tree is described in the room's docstring.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ray_ep.driver.run.claim import holder
from ray_ep.observe.state.events import Events, event_of
from ray_ep.observe.state.files import (
    Lines,
    Whole,
    masked_tree,
    number,
    objects,
    plain,
    read_config,
    read_exchange,
    read_topology,
    whole,
)  # fmt: skip
from ray_ep.observe.state.load import Load, sent_a_step
from ray_ep.observe.state.placements import Moved, Placements
from ray_ep.observe.state.standing import Standing
from ray_ep.observe.state.steps import Steps
from ray_ep.placement.placement import Placement
from ray_ep.placement.topology import Topology

PARTS = ("run", "model", "membership", "placement", "steps", "load", "links", "exchange", "events")
"""Of a snapshot."""

_FED_BY = {  # part -> files that it depends on
    "run": ("config", "metrics", "events"),
    "model": ("config", "events"),
    "membership": ("events",),
    "placement": ("placements", "events"),
    "steps": ("metrics",),
    "load": ("statistics",),
    "links": ("topology", "statistics"),
    "exchange": ("exchange",),
    "events": ("events",),
}


class RunState:
    """What a run directory says, read as it grows; whatever is missing, cut or damaged is left out, never an error.

    Any number of threads may call it.

    Attributes:
        version: grows with each change that a `refresh` finds.
        changed: version of the last change of each part.
        steps, events, standing, placements, load: the readers of the files.
    """

    def __init__(self, path: str | Path):
        """Look at `path` for the first time; there need not be anything yet."""
        self.path = Path(path)
        self.version = 0
        self.changed = dict.fromkeys(PARTS, 0)
        self._lock = threading.RLock()
        self._metrics, self._told = Lines(self.path / "metrics.jsonl"), Lines(self.path / "events.jsonl")
        self._config = Whole(self.path / "config.yaml", read_config)
        self._topology = Whole(self.path / "topology.json", read_topology)
        self._exchange = Whole(self.path / "exchange.json", read_exchange)
        self.steps, self.events, self.standing = Steps(), Events(), Standing()
        self.placements = Placements(self.path / "placements")
        self.load = Load(self.path / "statistics")
        self.refresh()

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, as it is: secrets included."""
        return self._config.value

    @property
    def topology(self) -> Topology | None:
        """The links."""
        return self._topology.value

    @property
    def exchange(self) -> dict[str, Any]:
        """How tokens travel, see `files.read_exchange`."""
        return self._exchange.value

    def refresh(self) -> bool:
        """Read what is new; whether anything has changed."""
        with self._lock:
            looks: dict[str, Callable[[], bool]] = {
                "config": self._config.changed,
                "topology": self._topology.changed,
                "exchange": self._exchange.changed,
                "metrics": self._read_metrics,
                "placements": self.placements.changed,  # before the events, which tell of them afterwards
                "events": self._read_events,
                "statistics": self.load.changed,
            }
            news = {name for name, look in looks.items() if look()}
            if news & {"placements", "events"}:
                self.placements.fold(self.standing.told())
            if not news:
                return False
            self.version += 1
            self.changed |= {part: self.version for part in PARTS if news & set(_FED_BY[part])}
            return True

    def snapshot(self, *parts: str, since: int = 0, mark: str = "") -> dict[str, Any]:
        """The tree of the room's docstring.

        Args:
            parts: of PARTS; none: all.
            since: leave out parts that have not changed after this version.
            mark: of the `steps` that the reader has: of that part only later ones, if it can be gone on with.

        Raises:
            KeyError: no such part.
        """
        with self._lock:
            make: dict[str, Callable[[], dict[str, Any]]] = {
                "run": self._run, "model": self._model, "membership": self._membership,
                "placement": self._placement, "steps": lambda: self.steps.snapshot(mark), "load": self.load.snapshot,
                "links": self._links, "exchange": lambda: masked_tree(self.exchange), "events": self.events.snapshot,
            }  # fmt: skip
            wanted = [part for part in parts or PARTS if self.changed[part] > since or not since]
            return {
                "version": self.version, "changed": dict(self.changed), **{part: make[part]() for part in wanted},
            }  # fmt: skip

    def placement(self, version: int) -> dict[str, Any] | None:
        """A placement for scrubbing: what was said of it, its slots, primaries and ranks; None: cannot be read."""
        with self._lock:
            placement = self.placements.read(version)
            if placement is None:
                return None
            return {**self._version(version), **_slots(placement), "ranks": self._ranks_under(version)}

    def why(self, layer: int, expert: int) -> str:
        """The sentence of the change that put an expert where it is; "": there is no such expert."""
        with self._lock:
            since = self.placements.since(layer, expert)
            if since is None:
                return ""
            said = self.standing.versions.get(since)
            if said is None:
                return f"placement {since}"
            return f"placement {since}, after step {said['step'] or 0}: {said['words']}"

    def moved(self, first: int, second: int) -> list[Moved]:
        """Experts that sit elsewhere in the second of two placements, by layer and expert."""
        with self._lock:
            return self.placements.between(first, second)

    def pairs(self, name: str, layer: int) -> np.ndarray | None:
        """[E, E] of one layer: `coactivation`, or `transitions` to the next; None: not known, or no such layer."""
        with self._lock:
            return self.load.layer_pairs(name, layer)

    def setting(self, key: str, default: Any) -> Any:
        """The configuration's value for a dotted key, or `default` where the file lacks it."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def _read_metrics(self) -> bool:
        news = False
        for anew, lines in self._metrics.news():
            if anew:
                self.steps, news = Steps(), True
            news |= self.steps.add(lines)
        return news

    def _read_events(self) -> bool:
        news = False
        for anew, lines in self._told.news():
            if anew:
                self.events, self.standing, news = Events(), Standing(), True
            for line in objects(lines):
                event = event_of(line)
                self.events.add(event)
                self.standing.add(event)
                news = True
        return news

    def _run(self) -> dict[str, Any]:
        said, rows = self.standing, self.steps.rows
        known = {"state": said.state, "why": said.why, "outcome": said.outcome, "error": said.error}
        done = max(rows[-1]["step"] if rows else 0, said.step)
        if not (said.state or said.outcome) and done >= number(self.setting("optim.steps", None)):
            known["outcome"] = "done"  # an older run, whose directory tells no states
        return {
            "name": self.path.resolve().name,
            "path": str(self.path.absolute()),
            **known,
            "alive": self._alive(),
            "started": said.started,
            "seen": self._seen(),
            "attempts": said.attempts,
            "done": done,
            "steps": whole(self.setting("optim.steps", None)),
            "config": masked_tree(self.config),
        }

    def _alive(self) -> bool | None:
        who = holder(self.path, unknown={"pid": None})
        return None if who == {"pid": None} else who is not None

    def _seen(self) -> str:
        """The last sign of life: when metrics or events were written last."""
        times = []
        for name in ("metrics.jsonl", "events.jsonl"):
            try:
                times.append((self.path / name).stat().st_mtime)
            except OSError:
                continue
        return datetime.fromtimestamp(max(times), timezone.utc).isoformat(timespec="seconds") if times else ""

    def _model(self) -> dict[str, Any]:
        """From the start event, the configuration, and the shape of what was counted."""
        said, newest = self.standing.model, self.placements.newest
        path, overrides = self.setting("model.path", ""), self.setting("model.overrides", {})
        over = overrides if isinstance(overrides, dict) and not path else {}
        layers, experts = (None, None) if newest is None else (newest.num_layers, newest.num_experts)
        sequences, length = (whole(self.setting(f"batch.{name}", None)) for name in ("sequences", "length"))
        told = {
            **said,
            "type": said.get("model") or str(path or self.setting("model.type", "")),
            "layers": said.get("layers", layers),
            "experts": said.get("experts", experts),
            "top_k": said.get("top_k", over.get("num_experts_per_tok")),
            "tokens": None if sequences is None or length is None else sequences * length,
            "dtype": self.setting("model.dtype", ""),
        }
        return dict(masked_tree(told))

    def _membership(self) -> dict[str, Any]:
        said = self.standing
        return {
            "epoch": said.epochs[-1]["epoch"] if said.epochs else None,
            "desired": None,
            "active": len(said.members) or None,
            **said.counts,
            "reason": said.reason,
            "ranks": [{**r, "state": "slow" if r["member"] in said.slow else "active"} for r in said.members],
            "epochs": said.epochs,
        }

    def _placement(self) -> dict[str, Any]:
        newest = self.placements.newest
        since = self.placements.since_all
        return {
            **({"version": None, "slots": [], "primary": []} if newest is None else _slots(newest)),
            "since": [] if since is None else since.tolist(),
            "versions": [self._version(number) for number in self.placements.numbers],
        }

    def _version(self, number: int) -> dict[str, Any]:
        said = {k: v for k, v in self.standing.versions.get(number, {}).items() if k not in ("ranks", "event")}
        return {"version": number, **said, "moved": self.placements.moved.get(number)}

    def _ranks_under(self, version: int) -> list[dict[str, Any]]:
        ranks: list[dict[str, Any]] = self.standing.versions.get(version, {}).get("ranks", [])
        return ranks

    def _links(self) -> dict[str, Any]:
        topology, newest = self.topology, self.load.newest
        sent = None if newest is None else sent_a_step(newest[1])
        out: dict[str, Any] = {"sent": None if sent is None else plain(sent)}
        for name in ("node_of", "bandwidth", "latency", "measured", "groups"):
            value = getattr(topology, name, None)
            out[name] = None if value is None else plain(np.asarray(value))
        return {**out, "measured_at": getattr(topology, "measured_at", None)}


def _slots(placement: Placement) -> dict[str, Any]:
    return {
        "version": placement.version,
        "num_experts": placement.num_experts,
        "slots": placement.slots.tolist(),
        "primary": placement.owner.tolist(),
    }
