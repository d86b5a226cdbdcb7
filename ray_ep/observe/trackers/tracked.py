"""Trackers as listeners of a run, each in a thread of its own: one that hangs or fails holds nobody up.

Its library is an extra of the package, looked for before anything starts and loaded when the run has begun. Where it
sends to is set as that library says, by its own variables.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ray_ep.config.schema import Config
from ray_ep.driver.ending import STATUS
from ray_ep.driver.publisher import LAST_S
from ray_ep.driver.records import Event, StepRecord
from ray_ep.errors import BadInput
from ray_ep.observe.trackers.libraries import MLflow, TensorBoard, WandB
from ray_ep.observe.trackers.otel import OpenTelemetry, check_exporters
from ray_ep.observe.trackers.told import Told, Tracker

TRACKERS: dict[str, tuple[str, Callable[[Told], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
    "otel": ("opentelemetry.sdk.trace", OpenTelemetry),
}
"""{name, which is that of the extra, too: (module that must be there, tracker)}."""

WAITING = 5000
"""Steps and events that wait for a slow tracker at most; further ones are left out."""

_NO_ARRAY: np.ndarray[Any, Any] = np.empty(0)


class Tracked:
    """A listener that hands what it hears to one tracker, from the start of the run on.

    Args:
        tell: takes a sentence for an operator, once for each tracker.
    """

    def __init__(self, name: str, cfg: Config, run_dir: Path, tell: Callable[[str], None]):
        self._name, self._cfg, self._run_dir, self._tell = name, cfg, run_dir, tell
        self._tracker: Tracker | None = None
        self._status = ""  # as an event says how it ended
        self._told = False  # that something is wrong
        self._queue: Queue[Callable[[], None] | None] = Queue(WAITING)
        self._thread = threading.Thread(target=self._serve, name=f"ray_ep-{name}", daemon=True)

    def __enter__(self) -> Tracked:
        """Nothing is loaded yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """What is left is written, or LAST_S have passed."""
        if not self._thread.is_alive():
            return
        self._end(partial(self._close, "failed" if kind else "done"))
        self._end(None)
        self._thread.join(LAST_S)
        if self._thread.is_alive():
            self._say(f"it has not taken everything within {LAST_S:g} s, and is left behind")

    def start(self, event: Event) -> None:
        """The run begins, or goes on."""
        config: Any = OmegaConf.to_container(self._cfg)
        self._queue.put(partial(self._make, Told(self._cfg.tracking.project, self._run_dir, config, event)))
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        light = replace(record, load=_NO_ARRAY, rank_load=_NO_ARRAY, sent=_NO_ARRAY, sample=None, provenance=None)
        self._put(lambda tracker: tracker.step(light))

    def event(self, event: Event) -> None:
        """Something happened."""
        self._status = STATUS.get(event.kind, self._status)
        self._put(lambda tracker: tracker.event(event))

    def _put(self, hand: Callable[[Tracker], None]) -> None:
        """To be handed over, if there is a tracker by then."""
        if not self._thread.is_alive():  # the run has not begun, or has ended
            return
        try:
            self._queue.put_nowait(lambda: hand(self._tracker) if self._tracker else None)
        except Full:
            self._say(f"it is too slow: {WAITING} steps and events wait for it, further ones are left out")

    def _end(self, last: Callable[[], None] | None) -> None:
        """Something that must get in, in place of what waits in vain."""
        while True:
            try:
                return self._queue.put_nowait(last)
            except Full:
                try:
                    self._queue.get_nowait()
                except Empty:
                    continue

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                item()
            except Exception as e:  # each library has errors of its own
                words = " ".join(str(e).split())
                words = words if len(words) <= 300 else f"{words[:299]}…"
                self._say(f"{type(e).__name__}: {words}" if words else type(e).__name__)

    def _make(self, told: Told) -> None:
        self._tracker = TRACKERS[self._name][1](told)

    def _close(self, otherwise: str) -> None:
        if self._tracker is not None:
            self._tracker.close(self._status or otherwise)

    def _say(self, words: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"tracking.to={self._name}: {words}; the run goes on")


def check_trackers(cfg: Config) -> None:
    """Whether each library is there, and takes the project's name; raises BadInput."""
    project = cfg.tracking.project
    for name in cfg.tracking.to:
        if name not in TRACKERS:
            raise BadInput(f"tracking.to={name}: expected {', '.join(TRACKERS)}")
        if not _is_there(TRACKERS[name][0]):
            raise BadInput(f"tracking.to={name}: it is not installed: pip install 'ray_ep[{name}]'")
        if name in ("mlflow", "wandb") and not project.strip():
            raise BadInput(f"tracking.project={project!r}: tracking.to={name} needs a name")
        if name == "wandb" and (len(project) > 128 or re.search(r"[/\\#?%:]", project)):
            raise BadInput(f"tracking.project={project!r}: wandb takes up to 128 characters, and none of / \\ # ? % :")
        if name == "otel":
            check_exporters()


def _is_there(module: str) -> bool:
    """Whether it can be imported; a directory of that name, such as wandb leaves where it ran, is no module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # of what it lies in
        return False
    return spec is not None and spec.origin is not None


@contextmanager
def trackers(cfg: Config, run_dir: Path, tell: Callable[[str], None]) -> Iterator[list[Tracked]]:
    """Listeners for all that `tracking.to` names; closed at the end. `tell`: see Tracked."""
    with ExitStack() as stack:
        yield [stack.enter_context(Tracked(name, cfg, run_dir, tell)) for name in dict.fromkeys(cfg.tracking.to)]
