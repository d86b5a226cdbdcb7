"""`ray-ep dashboards`: where a run is shown beside its own page. Thin shells; neither torch nor Ray is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)
PORT = 8264
"""Of the proxy on a cluster's head, as the files in cluster/ have it: beside that of Ray's dashboard, 8265."""


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


@dashboards.command("open")
@click.argument("run", type=_FOLDER, required=False)
@click.option("--print", "only_print", is_flag=True, help="Print the address, and open no browser.")
def open_page(run: Path | None, only_print: bool) -> None:
    """Open the page of the run in the directory RUN: of one that goes its live page, else its report.html.

    Without RUN it is the run that was started last from this directory. Prints the address, and opens it in a browser
    where the output is a terminal.

    \b
      ray-ep dashboards open
      ray-ep dashboards open runs/20260701-123005 --print
    """
    from ray_ep.config.runs import newest
    from ray_ep.errors import BadInput
    from ray_ep.observe.dashboard.address import address_of

    if run is None and (run := newest()) is None:
        raise BadInput("no run was started from here: give RUN, a run directory")
    address, words = address_of(run)
    if words:
        click.echo(words, err=True)
    click.echo(address)
    if sys.stdout.isatty() and not only_print:
        click.launch(address)


@dashboards.command()
@click.option("--address", default="127.0.0.1:6379", show_default=True, help="HOST:PORT of Ray's head.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(1, 65535), help="To listen at.")
def proxy(address: str, port: int) -> None:
    """Put the pages of a cluster's runs into Ray's dashboard, on the head: what the dashboard asks first.

    Start it before the head, and name it there; it ends with SIGINT or SIGTERM. It listens on 127.0.0.1 alone.

    \b
      ray-ep dashboards proxy &
      ray start --head --proxy-server-url=http://127.0.0.1:8264
    """
    from ray_ep.observe.dashboard.serving import serve

    serve(port, address)
