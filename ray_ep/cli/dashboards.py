"""`ray-ep dashboards`: where a run is shown beside its own page. Thin shells; neither torch nor Ray is loaded."""

from __future__ import annotations

import click


@click.group()
def dashboards() -> None:
    """Show runs in Ray's dashboard and in Grafana."""
