"""The progress of a run for whoever watches: a live bar on a terminal, plain key=value lines in a file or pipe.

What a step measured is handed in; nothing is measured or stored here. The clock is passed in, for tests.
Imports rich and the driver's records.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Protocol, TextIO

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ray_ep.driver.records import STANDING, Event, StepRecord

_EVERY_S = 5.0  # between plain lines; a job's log is read afterwards, too
COMMANDS = ("failed", "diverged")
"""Events that the command ends with itself, with all there is to say."""
_SHORT = {"tokens_per_second": "tokens/s", "eval_loss": "held out"}  # on the bar, where room is scarce


class Progress:
    """Shows steps and events of one run; use it as a context manager around the run.

    Steps count from 1 and are those of the run, so a resumed run begins in the middle. `stream` is stderr by default,
    for stdout belongs to results. Every line begins with `prefix` if there is one: the mark of a forced router.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        prefix: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        stream = sys.stderr if stream is None else stream
        console = Console(file=stream, highlight=False, markup=False)
        live = stream.isatty() and console.is_interactive  # rich alone would take FORCE_COLOR for a terminal
        lead = f"{prefix} " if prefix else ""
        self._view: _View = _Bar(total_steps, console, lead) if live else _Lines(total_steps, stream, lead, clock)
        self._held_out: float | None = None

    def __enter__(self) -> Progress:
        """Nothing is shown before `start` or an event."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the last state on the screen, also after an error, which goes on to the caller."""
        self._view.close()

    def start(self, event: Event) -> None:
        """Say what begins now."""
        self._view.start(event.words)

    def step(self, record: StepRecord) -> None:
        """Show one step, with the newest loss on the held-out split."""
        if record.eval_loss is not None:
            self._held_out = record.eval_loss
        self._view.step(record.step, _figures(record, self._held_out))

    def event(self, event: Event) -> None:
        """Show an event at once, unless the command that shows this says it at its end, or it only says what is so."""
        if event.kind not in (*COMMANDS, *STANDING):
            self._view.event(event.kind, event.words)


class _View(Protocol):
    """A way to show a run; the lead stands before every line."""

    def start(self, description: str) -> None: ...

    def step(self, step: int, figures: dict[str, str]) -> None: ...

    def event(self, kind: str, message: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """Plain lines: the first step, then one every few seconds, and the last."""

    def __init__(self, total: int, stream: TextIO, lead: str, clock: Callable[[], float]):
        self._total, self._stream, self._lead, self._clock = total, stream, lead, clock
        self._printed_at = -math.inf
        self._waiting = ""  # the newest step's line, if it is not printed yet

    def start(self, description: str) -> None:
        self._print(f"start {description}")

    def step(self, step: int, figures: dict[str, str]) -> None:
        self._waiting = " ".join([f"step={step}/{self._total}", *(f"{k}={v}" for k, v in figures.items())])
        if step >= self._total or self._clock() - self._printed_at >= _EVERY_S:
            self._print_waiting()

    def event(self, kind: str, message: str) -> None:
        self._print(f"event kind={kind} {message}")

    def close(self) -> None:
        """The last step is printed also where the run ended early."""
        if self._waiting:
            self._print_waiting()

    def _print_waiting(self) -> None:
        self._print(self._waiting)
        self._waiting, self._printed_at = "", self._clock()

    def _print(self, text: str) -> None:
        self._stream.write(_led(self._lead, text) + "\n")
        self._stream.flush()


class _Bar:
    """A live bar with the newest step's figures below it; events scroll by above."""

    def __init__(self, total: int, console: Console, lead: str):
        self._lead, self._console, self._figures = lead, console, ""
        plain = partial(TextColumn, markup=False)  # square brackets of a prefix are no markup
        columns = [plain("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()]
        self._bar = rich.progress.Progress(*columns, plain("left"), TimeRemainingColumn(), console=console, expand=True)
        self._task = self._bar.add_task(lead, total=total)
        self._live = Live(console=console, get_renderable=self._render)

    def start(self, description: str) -> None:
        self._bar.update(self._task, description=_led(self._lead, description))
        self._live.start()

    def step(self, step: int, figures: dict[str, str]) -> None:
        self._live.start()
        self._bar.update(self._task, completed=step)
        self._figures = _led(self._lead, " · ".join(f"{_SHORT.get(k, k)} {v}" for k, v in figures.items()))

    def event(self, kind: str, message: str) -> None:
        text = Text(_led(self._lead, f"{kind}: {message}"), style="yellow")
        self._console.print(text, soft_wrap=True)  # a wrapped line would lack the prefix

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        return Group(self._bar, Text(self._figures))


def _led(lead: str, text: str) -> str:
    """`text` with `lead` before each of its lines."""
    return "\n".join(lead + line for line in text.splitlines() or [""])


def _figures(record: StepRecord, held_out: float | None) -> dict[str, str]:
    """Name -> figure as text; `held_out` once there was one."""
    figures = {"loss": format(record.loss, ".4f")}
    if held_out is not None:
        figures["eval_loss"] = format(held_out, ".4f")
    figures["tokens_per_second"] = format(record.tokens_per_second, ".0f")
    figures["exchange"] = format(record.exchange_seconds / record.step_seconds, ".0%")
    figures["balancedness"] = format(record.balancedness, ".2f")
    return figures
