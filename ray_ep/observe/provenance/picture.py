"""The path of one token as a picture: one self-contained page, MoE layers downwards, ranks side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ray_ep.observe.provenance.path import Hop, Place, TokenPath, shown


def write_picture(path: TokenPath, out: Path) -> None:
    """Write the page. Raises OSError."""
    places = {path.home.rank: path.home} | {h.place.rank: h.place for hops in path.layers.values() for h in hops}
    ranks = [places[rank] for rank in sorted(places)]
    hosts: list[tuple[str, int]] = []
    for place in ranks:  # neighbours of one node have one head
        if hosts and hosts[-1][0] == place.host:
            hosts[-1] = place.host, hosts[-1][1] + 1
        else:
            hosts.append((place.host, 1))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("path.html").render(
        path=path,
        before=shown(path.before),
        text=shown(path.text),
        after=shown(path.after),
        ranks=ranks,
        hosts=hosts,
        layers=[(layer, _cells(hops, ranks)) for layer, hops in path.layers.items()],
    )
    out.write_text(text, encoding="utf-8")


def _cells(hops: list[Hop], ranks: list[Place]) -> list[list[dict[str, Any]]]:
    """What each rank computed in one layer."""
    return [
        [
            {"hop": hop, "share": round(100 * max(0.0, min(hop.weight, 1.0)))}
            for hop in hops
            if hop.place.rank == place.rank
        ]
        for place in ranks
    ]
