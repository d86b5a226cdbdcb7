"""Exports a run while it goes: a listener of the driver, and a thread that sends its figures every few seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ray_ep.config.schema import Config
from ray_ep.driver.ending import STATUS
from ray_ep.driver.records import Event, StepRecord
from ray_ep.observe.metrics.exporter import Exporter
from ray_ep.observe.metrics.figures import Taken
from ray_ep.observe.metrics.reading import Reading

EVERY_S = 5.0
"""Seconds between two times that everything is sent: Ray forgets a gauge that was not set for 20 s."""


class Sending(Protocol):
    """Of an exporter what is used here."""

    def send(self, figures: Taken) -> None:
        """Hand them on."""


class Metrics:
    """Exports the figures of one run; a listener, and a context manager that ends its thread.

    Args:
        run_dir: the run directory; its name is the tag `run`.
        steps: of the whole run. From the last one on, or from an end that is told, all is sent at once: Ray goes soon.
        failed: told once, with the reason, if figures could not be sent; they are no more then, and the run goes on.
        exporter: made with the tag.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        failed: Callable[[str], None],
        exporter: Callable[[str], Sending] = Exporter,
        every_s: float = EVERY_S,
    ):
        self._steps, self._failed, self._every_s = steps, failed, every_s
        self._reading, self._exporter = Reading(run_dir), exporter(run_dir.absolute().name)
        self._ending = False
        self._sending = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="ray_ep-metrics", daemon=True)

    def __enter__(self) -> Metrics:
        """Nothing is sent before the run has started."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is sent any more once this returns."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def start(self, event: Event) -> None:
        """The ranks are ready: what is known of them is sent from here on."""
        self._reading.start(event)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        self._reading.step(record)
        self._ending |= record.step >= self._steps
        if self._ending:
            self._send()

    def event(self, event: Event) -> None:
        """Something happened."""
        self._reading.event(event)
        self._ending |= event.kind in STATUS
        if self._ending:
            self._send()

    def _serve(self) -> None:
        self._send()
        while not self._over.wait(self._every_s):
            self._send()

    def _send(self) -> None:
        with self._sending:
            if self._over.is_set():
                return
            try:
                self._exporter.send(self._reading.take())
            except Exception as e:  # of any kind: it is no reason to end a run
                self._over.set()
                self._failed(f"metrics are exported no more, the run goes on: {type(e).__name__}: {e}")


@contextmanager
def exported(
    cfg: Config, run_dir: Path, failed: Callable[[str], None], exporter: Callable[[str], Sending] = Exporter
) -> Iterator[list[Metrics]]:
    """The listener that exports the run, as long as the context lasts; none where observe.metrics is off."""
    if not cfg.observe.metrics:
        yield []
        return
    with Metrics(run_dir, cfg.optim.steps, failed, exporter) as metrics:
        yield [metrics]
