"""`ray-ep top`: a run in the terminal, live: figures, ranks, events, drawn again as they change."""

from __future__ import annotations

import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from ray_ep.cli.control.options import Seconds, access, as_json, client

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ray_ep.control.v1 import control_pb2 as pb

REMEMBERED = 60
"""Steps whose times and losses are drawn."""
_BARS = "▁▂▃▄▅▆▇█"


@click.command()
@access
@click.option(
    "--every", type=Seconds(0.2, 3600), default=1.0, show_default=True, metavar="S", help="Seconds between two looks."
)
def top(where: str, every: float, **given: Any) -> None:
    """Show a run live, until it ends or you press Ctrl-C, which leaves the run alone.

    With --json, or where the output is no terminal that can be drawn on, one line a change.

    \b
      ray-ep top runs/20260701-123005
    """
    from rich.console import Console
    from rich.live import Live

    from ray_ep.cli.control.words import counts, figures, state_of

    console, view, last = Console(), View(), None
    with client(where, given) as it:
        if given["as_json"] or not sys.stdout.isatty() or console.is_dumb_terminal:
            for status in it.watch(every):
                parts = (state_of(status), f"step {status.done}", figures(status.step), counts(status.membership))
                click.echo(as_json(status) if given["as_json"] else "; ".join(filter(None, parts)))
            return
        with (
            suppress(KeyboardInterrupt),
            Live(console=console, screen=True, auto_refresh=False, transient=True) as live,
        ):
            for last in it.watch(every):
                view.add(last)
                live.update(view.drawn(last, console.height), refresh=True)
    if last is not None:
        click.echo(f"{last.run}: {state_of(last)}, {last.done} of {last.steps} steps")


class View:
    """What is drawn, with what was seen so far."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=REMEMBERED)  # step, loss, seconds

    def add(self, status: pb.RunStatus) -> None:
        """Remember the newest step."""
        step = status.step
        if step.step and (not self._seen or self._seen[-1][0] != step.step):
            self._seen.append((step.step, step.loss, step.step_seconds))

    def drawn(self, status: pb.RunStatus, height: int) -> RenderableType:
        """The screen; `height` in lines."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from ray_ep.cli.control.words import counts, figures, newest_of, state_of

        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        head.add_row(Text(state_of(status), "bold"), f"step {status.done} of {status.steps}")
        bar = Table.grid(expand=True)  # alone it would not end its line
        bar.add_row(ProgressBar(total=max(status.steps, 1), completed=status.done))
        body: list[RenderableType] = [
            head,
            bar,
            Text(figures(status.step)),
            Text(f"loss     {bars([loss for _, loss, _ in self._seen])}"),
            Text(f"seconds  {bars([seconds for _, _, seconds in self._seen])}"),
            Text(f"{counts(status.membership)}; placement {status.placement_version}"),
        ]
        ranks = Table(expand=True, box=None)
        for name in ("rank", "member", "host", "node", "device"):
            ranks.add_column(name, overflow="ellipsis", no_wrap=True)
        room = max(height - len(body) - 12, 3)
        for rank in status.membership.ranks[:room]:
            ranks.add_row(str(rank.rank), Text(rank.member), Text(rank.host), rank.node[:12], rank.device)
        if len(status.membership.ranks) > room:
            ranks.add_row("…", f"{len(status.membership.ranks) - room} more")
        events = [Text(words, overflow="ellipsis") for words in newest_of(status, 6)]
        for text in events:
            text.no_wrap = True
        return Panel(Group(*body, ranks, Text(""), *events), title=Text(status.run), border_style="dim")


def bars(values: list[float]) -> str:
    """A curve of one character a value, from the least to the greatest of them."""
    finite = [v for v in values if abs(v) < float("inf")]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    cells = [_BARS[int((v - low) / span * (len(_BARS) - 1))] if span else _BARS[0] for v in finite]
    return f"{''.join(cells)}  {low:.4g} to {max(finite):.4g}"
