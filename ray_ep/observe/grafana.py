"""Puts our Grafana dashboards and alert rules where Ray's own Grafana and Prometheus read theirs. Files only; no Ray.

The dashboards themselves are data, in ray_ep/dashboards/; the metrics that they show are metrics/'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_ep.errors import BadInput

DASHBOARDS = Path(__file__).parents[1] / "dashboards" / "grafana"
"""Our dashboards: training, placement, links, elasticity."""
RULES = Path(__file__).parents[1] / "dashboards" / "prometheus" / "alerts.yaml"
"""Our alert rules, for Prometheus."""
LATEST = Path("/tmp/ray/session_latest")
"""What Ray calls the session that was started last."""
RAYS_OWN = "default_grafana_dashboard.json"
"""The dashboard that Ray generates at each start and shows in the Metrics tab of its own page."""
ROW = {
    "training": ("Step time", "Tokens per second", "Loss", "Where a step goes"),
    "placement": ("Balance over ranks", "Load of each rank"),
    "links": ("Bytes exchanged",),
    "elasticity": ("Ranks",),
}
"""Titles of the panels that join Ray's dashboard, by the dashboard that has them."""

_IDS = range(9000, 9100)  # of the row and its panels, whatever the version; Ray's own are below 2000
_HEIGHT, _WIDTH = 8, 12  # of a panel in the row, in Grafana's units; two stand beside each other
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Installed:
    """What was written: our dashboards, Ray's with our row, and the configuration that names our rules; None: not."""

    dashboards: list[Path]
    merged: Path | None
    prometheus: Path | None


def install(session: Path = LATEST, grafana: Path | None = None) -> Installed:
    """Copy our dashboards beside Ray's, put our row into Ray's own, and our alert rules into its Prometheus.

    May be done again at any time: what was there of us is replaced. Ray writes its files anew when a head starts.

    Args:
        session: directory of a Ray session whose head has its dashboard.
        grafana: the folder of dashboards of another Grafana; then nothing of the session is touched.

    Raises:
        BadInput: a folder or file is missing, damaged, or cannot be written; nothing was written before that was known.
    """
    session = session.resolve()  # what session_latest means changes with the next head
    folder = grafana or session / "metrics" / "grafana" / "dashboards"
    if not folder.is_dir():
        raise BadInput(_missing(session) if grafana is None else f"--grafana {grafana}: no such directory")
    ours = {path.stem: _read(path) for path in sorted(DASHBOARDS.glob("*.json"))}
    files = {folder / f"ray_ep_{name}.json": _text(tree) for name, tree in ours.items()}
    merged, prometheus = folder / RAYS_OWN, session / "metrics" / "prometheus" / "prometheus.yml"
    if merged.exists():
        try:
            files[merged] = _text(with_row(_read(merged), ours))
        except (KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{merged}: no dashboard of Grafana: its panels are damaged: {e!r}") from None
    elif grafana is None:
        raise BadInput(f"{folder} has no {RAYS_OWN}: {_missing(session)}")
    rules = grafana is None and prometheus.exists()
    if rules:
        ours_there = prometheus.with_name("ray_ep_alerts.yaml")
        files |= {ours_there: RULES.read_text("utf-8"), prometheus: _with_rules(prometheus, ours_there)}
    for path, text in files.items():
        _write(path, text)
    copied = [folder / f"ray_ep_{name}.json" for name in ours]
    return Installed(copied, merged if merged in files else None, prometheus if rules else None)


def with_row(rays: Tree, ours: Mapping[str, Tree]) -> Tree:
    """Ray's dashboard, a row of our panels at its top in place of one that may be there already.

    It has no variable for the run, so that these panels show every run of the session.
    """
    panels = [_panel(ours[name], title) for name, titles in ROW.items() for title in titles]
    head: Tree = {"type": "row", "title": "ray_ep", "collapsed": False, "panels": [], "id": _IDS[0]}
    head["gridPos"] = {"h": 1, "w": 2 * _WIDTH, "x": 0, "y": 0}
    for n, panel in enumerate(panels):
        panel["id"] = _IDS[1 + n]
        panel["gridPos"] = {"h": _HEIGHT, "w": _WIDTH, "x": _WIDTH * (n % 2), "y": 1 + _HEIGHT * (n // 2)}
    others = [panel for panel in rays.get("panels") or [] if panel.get("id") not in _IDS]
    down = 1 + _HEIGHT * -(-len(panels) // 2) - min((p["gridPos"]["y"] for p in others if p.get("gridPos")), default=0)
    return {**rays, "panels": [head, *panels, *(_moved(panel, down) for panel in others)]}


def _panel(dashboard: Tree, title: str) -> Tree:
    (panel,) = (panel for panel in dashboard["panels"] if panel["title"] == title)
    panel = json.loads(json.dumps(panel))
    for target in panel["targets"]:
        target["expr"] = target["expr"].replace("$run", ".+")
    return dict(panel)


def _moved(panel: Tree, down: int) -> Tree:
    """`panel` so far below where it was, with those that a folded row holds; one without a place stays without."""
    inside = {"panels": [_moved(p, down) for p in panel["panels"]]} if panel.get("panels") else {}
    place = panel.get("gridPos")
    return {**panel, **inside} | ({"gridPos": {**place, "y": place["y"] + down}} if place else {})


def _with_rules(prometheus: Path, rules: Path) -> str:
    """Prometheus' configuration, which names our rules, too."""
    try:
        tree = yaml.safe_load(prometheus.read_text("utf-8"))
        named = tree.get("rule_files") or []
        if str(rules) in named:
            return prometheus.read_text("utf-8")
        return str(yaml.safe_dump({**tree, "rule_files": [*named, str(rules)]}, sort_keys=False))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as e:
        raise BadInput(f"{prometheus}: no configuration of Prometheus: {e}") from None


def _missing(session: Path) -> str:
    if not session.is_dir():
        return f"--session {session}: no such directory: expected that of a Ray session, such as {LATEST}"
    return (
        f"--session {session}: Ray has written no dashboards for Grafana there: its dashboard does not run; start Ray "
        "with it (ray start --head --include-dashboard=true; cluster.dashboard=true for a local Ray)"
    )


def _read(path: Path) -> Tree:
    try:
        tree = json.loads(path.read_text("utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("expected an object")
        return tree
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: no dashboard of Grafana: {e}") from None


def _text(tree: Tree) -> str:
    return json.dumps(tree, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    """Replace a file whole: Grafana looks at its folder every few seconds."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise BadInput(f"{path}: cannot write there: {e.strerror or e}") from None
