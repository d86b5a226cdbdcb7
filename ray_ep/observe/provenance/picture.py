"""The path of one token as a picture: one self-contained page, MoE layers downwards, ranks side by side."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from ray_ep.observe.page.html import whole_page
from ray_ep.observe.provenance.path import Hop, TokenPath, shown


def write_picture(path: TokenPath, out: Path) -> None:
    """Write the page, which dashboards/page/path.js draws. Raises OSError."""
    places = {path.home.rank: path.home} | {h.place.rank: h.place for hops in path.layers.values() for h in hops}
    ranks = [places[rank] for rank in sorted(places)]
    data = {
        "before": shown(path.before),
        "text": shown(path.text),
        "after": shown(path.after),
        "facts": path.facts,
        "hosts": [[host, len(list(its))] for host, its in groupby(place.host for place in ranks)],
        "ranks": [{"rank": p.rank, "device": p.device, "home": p.rank == path.home.rank} for p in ranks],
        "layers": [
            {"layer": layer, "cells": [[_told(hop) for hop in hops if hop.place.rank == p.rank] for p in ranks]}
            for layer, hops in path.layers.items()
        ],
    }
    out.write_text(whole_page(path.name, data, "path", charts=False), encoding="utf-8")


def _told(hop: Hop) -> dict[str, Any]:
    return {"expert": hop.expert, "weight": hop.weight, "kind": hop.kind, "why": hop.why}
