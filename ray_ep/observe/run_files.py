"""Reads a run directory for the page. Whatever is missing, cut short or damaged is left out, never an error.

Writing these files is the driver's work; drawing them is in figures.py and report.py.
Imports NumPy, PyYAML and the topology only.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ray_ep.errors import PlacementError
from ray_ep.placement.placement import files_by_version
from ray_ep.placement.topology import Topology

_NEWEST = 1000  # steps: what a long run's step takes now, not what it took days ago
_VALUE = r"""("[^"\n]*"|'[^'\n]*'|[^\s&'"]+)"""
_SECRETS = (
    (re.compile(r"(://)[^/@\s]+@"), r"\1***@"),  # user:password@host
    (re.compile(r"(?i)((?:token|secret\w*|password|signature|api_?key)\s*[=:] *)" + _VALUE), r"\1***"),
)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run directory holds, as far as it could be read. L MoE layers, E experts, R ranks, S slots."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # one a step, in the order of steps
    events: list[dict[str, Any]]
    load: np.ndarray | None  # [L, E] tokens an expert received
    coactivation: np.ndarray | None  # [L, E, E] tokens for which both fired
    placement_version: int
    slots: list[list[list[int]]]  # [L][R][S] expert, -1 = empty; [] without a placement
    exchange: dict[str, Any]  # the choice of the exchange, with `timings`; {} without one
    topology: Topology | None

    def column(self, name: str) -> np.ndarray:
        """One figure over the steps, float64 [steps]; NaN where a step lacks it."""
        return np.array([_number(line.get(name)) for line in self.metrics], dtype=np.float64)

    def phase_seconds(self) -> dict[str, np.ndarray]:
        """Seconds of each phase by name, float64 [steps], over the newest half of the steps that tell, at most 1000.

        A phase that a step lacks took it no time; NaN is what cannot be a time.
        """
        told = [line["phase_seconds"] for line in self.metrics if isinstance(line.get("phase_seconds"), dict)]
        told = [phases for phases in told if phases]
        told = told[max(len(told) // 2, len(told) - _NEWEST) :]
        names = dict.fromkeys(name for phases in told for name in phases)
        columns = {n: np.array([_number(phases.get(n, 0.0)) for phases in told], dtype=np.float64) for n in names}
        return {n: np.where(seconds >= 0, seconds, np.nan) for n, seconds in columns.items()}

    def setting(self, key: str, default: Any) -> Any:
        """The configuration's value for a dotted key, or `default` where the file lacks it."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is in `run_dir`."""
    lines = {int(m["step"]): m for m in _json_lines(run_dir / "metrics.jsonl") if np.isfinite(_number(m.get("step")))}
    load, coactivation = _read_statistics(run_dir / "statistics" / "routing.npz")
    version, slots = _read_placement(run_dir / "placements")
    return RunFiles(
        config=_read_config(run_dir / "config.yaml"),
        metrics=[lines[step] for step in sorted(lines)],  # of a repeated step the last line counts
        events=_json_lines(run_dir / "events.jsonl"),
        load=load,
        coactivation=coactivation,
        placement_version=version,
        slots=slots,
        exchange=_read_exchange(run_dir / "exchange.json"),
        topology=_read_topology(run_dir / "topology.json"),
    )


def masked(text: str) -> str:
    """`text` without the passwords and tokens that addresses and settings may carry."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else float("nan")
    except OverflowError:  # an integer of hundreds of digits
        return float("nan")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line that a killed run left half written is skipped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    objects = []
    for line in text.splitlines():
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return [o for o in objects if isinstance(o, dict)]


def _read_statistics(path: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(load [L, E], coactivation [L, E, E]), None for what is missing or does not fit."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for name in set(file.files) & {"load", "coactivation"}:
                arrays[name] = file[name].astype(np.float64)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    load = arrays.get("load")
    if load is None or load.ndim != 2 or load.size == 0:
        return None, None
    pairs = arrays.get("coactivation")
    fits = pairs is not None and pairs.shape == (*load.shape, load.shape[1])
    return load, pairs if fits else None


def _read_exchange(path: Path) -> dict[str, Any]:
    """The choice, its timings those that can be read: words, and timings of kind, transport, seconds and rounds."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        words = str(tree["words"])
        rows = [(str(t["kind"]), str(t["transport"]), float(t["seconds"]), int(t["rounds"])) for t in tree["timings"]]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    names = ("kind", "transport", "seconds", "rounds")
    taken = (str(tree.get("kind")), str(tree.get("transport")))
    timings = [dict(zip(names, row, strict=True), taken=row[:2] == taken) for row in sorted(rows, key=lambda r: r[2])]
    return {"words": words, "timings": timings}


def _read_placement(folder: Path) -> tuple[int, list[list[list[int]]]]:
    """(version, slots) of the newest placement that can be read."""
    for path in reversed(files_by_version(folder)):
        try:
            placement = json.loads(path.read_text(encoding="utf-8"))
            slots = [[[int(e) for e in rank] for rank in layer] for layer in placement["slots"]]
            return int(placement.get("version", 0)), slots
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return 0, []


def _read_topology(path: Path) -> Topology | None:
    try:
        return Topology.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, PlacementError):
        return None
