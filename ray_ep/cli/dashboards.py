"""`ray-ep dashboards`: where a run is shown beside its own page. Thin shells; neither torch nor Ray is loaded."""

from __future__ import annotations

from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.group()
def dashboards() -> None:
    """Show runs in Ray's dashboard and in Grafana."""


@dashboards.command()
@click.option("--session", type=_FOLDER, default="/tmp/ray/session_latest", show_default=True, help="Of a running Ray.")
@click.option("--grafana", type=_FOLDER, help="The folder of dashboards of your own Grafana, in place of Ray's.")
def install(session: Path, grafana: Path | None) -> None:
    """Add ray_ep's panels to the Metrics tab of Ray's dashboard, four dashboards to its Grafana, alerts to Prometheus.

    On the head's machine: Ray has written configurations of Grafana and Prometheus into its session's directory, and
    ours join them. Do it again after each start of a head. With --grafana the four dashboards are copied there, and
    nothing else is done. What the panels show, and how Prometheus and Grafana are started: docs/metrics.md.

    \b
      ray-ep dashboards install
      ray-ep dashboards install --session /mnt/ray/session_latest
      ray-ep dashboards install --grafana /var/lib/grafana/dashboards
    """
    from ray_ep.observe import grafana as files

    done = files.install(session, grafana)
    for path in done.dashboards:
        click.echo(f"dashboard: {path}")
    if done.merged is not None:
        click.echo(f"row of panels in Ray's dashboard: {done.merged}")
    if done.prometheus is not None:
        click.echo(f"alert rules, once Prometheus has read it again: {done.prometheus}")
