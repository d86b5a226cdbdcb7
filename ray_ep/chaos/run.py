"""A disturbed run and its reference, from the last check to the report. What a terminal sees goes to `say`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from ray_ep.chaos.faults import Faults, NotNow
from ray_ep.chaos.grounds import Ground
from ray_ep.chaos.observer import Observer, Step
from ray_ep.chaos.processes import Training, ray_ep
from ray_ep.chaos.report import Curve, Injected, Report, Seen, curve_of, open_still, report
from ray_ep.chaos.schedule import Fault, Wish, schedule
from ray_ep.config import load_config
from ray_ep.config.schema import Config
from ray_ep.driver.start import check_run
from ray_ep.errors import BadInput, ClusterError, RayEPError

_LOOK_S = 0.1
_SETTLE_S = 60.0
"""How long the last recovery is waited for."""
_SAVE_S = 120.0
"""How long a run that is done may take to save and go."""
_BAD_INPUT = 2


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A run that was disturbed, as it was seen; `failed`: why it ended by itself, "": it did not, or it was done."""

    seen: Seen
    faults: Sequence[Injected]
    failed: str


@dataclass(frozen=True, slots=True)
class Found:
    """The report, and what the page draws."""

    report: Report
    disturbed: Disturbed
    undisturbed: Curve


def chaos(
    cfg: Config,
    wish: Wish,
    ground: Callable[[], Ground],
    folder: Path,
    against: Curve | None,
    say: Callable[[str], None],
) -> Found:
    """Run it disturbed, then, without a curve to compare with, undisturbed for as many steps.

    Args:
        ground: makes a new one. folder: there, and empty; gets both runs' directories, logs and chaos.json.

    Raises:
        BadInput: the run was refused. ClusterError: the ground could not be had. RayEPError: no first step was made.
    """
    config = folder / "train.yaml"
    config.write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    try:
        check_run(load_config(config, _own(folder / "disturbed")), datetime.now()).run.release()
    except BaseException:
        config.unlink()
        folder.rmdir()
        raise
    disturbed = disturb(config, cfg, wish, ground(), folder, say)
    steps = max((s.number for s in disturbed.seen.steps), default=0)
    if against is None:
        say(f"the same {steps} steps, undisturbed")
        against = undisturbed(config, ground(), folder, steps)
    counted = report(disturbed.seen, disturbed.faults, against, wish.tolerance, disturbed.failed)
    (folder / "chaos.json").write_text(json.dumps(counted.to_dict(), indent=1), encoding="utf-8")
    return Found(counted, disturbed, against)


def disturb(
    config: Path, cfg: Config, wish: Wish, ground: Ground, folder: Path, say: Callable[[str], None]
) -> Disturbed:
    """The run with its faults: from its first step on, for as long as is wished or until it ends by itself."""
    todo = list(schedule(wish))
    with ExitStack() as stack:
        training, observer = _started(stack, ground, config, folder, "disturbed")
        _first_step(training, observer)
        began = observer.steps[0].at
        least = max(cfg.elastic.min_ranks, 1)
        faults = Faults(ground, training.session, cfg.cluster.silence_s, least, wish.every_s / 2)
        done: list[Injected] = []
        while (now := time.monotonic()) - began < _end(wish, done, observer) and training.status is None:
            try:
                faults.tend()
            except ClusterError as e:
                say(str(e))
            following = todo[1].at if len(todo) > 1 else wish.seconds
            if todo and now - began >= todo[0].at:
                outcome = _tried(faults, todo[0], now, last=now - began >= following)
                if outcome is not None:
                    done.append(outcome)
                    todo.pop(0)
                    say(_told(outcome, began, observer.steps))
            time.sleep(_LOOK_S)
        by_itself = training.status is not None
        training.end(_SAVE_S)
        failed = "" if not by_itself or training.status == 0 else training.words()
    return Disturbed(_seen(observer), done, failed)


def _end(wish: Wish, done: Sequence[Injected], observer: Observer) -> float:
    """Seconds after the first step at which the run is ended: later where it still recovers."""
    recovering = any(open_still(f, _seen(observer)) for f in done)
    return wish.seconds + _SETTLE_S * recovering


def _seen(observer: Observer) -> Seen:
    return Seen(observer.steps, observer.recoveries, observer.switches, observer.failures, observer.planned)


def undisturbed(config: Path, ground: Ground, folder: Path, steps: int) -> Curve:
    """The same run without faults, for so many steps."""
    with ExitStack() as stack:
        training, observer = _started(stack, ground, config, folder, "undisturbed")
        _first_step(training, observer)
        while training.status is None and observer.steps[-1].number < steps:
            time.sleep(_LOOK_S)
        if training.status not in (None, 0):
            raise RayEPError(f"the undisturbed run failed: {training.words()}")
        training.end(_SAVE_S)
    return curve_of([(s.number, s.loss, s.seconds) for s in observer.steps])


def _started(stack: ExitStack, ground: Ground, config: Path, folder: Path, name: str) -> tuple[Training, Observer]:
    """The ground, the run on it, and who watches that."""
    stack.enter_context(ground)
    run_dir = folder / name
    words = ray_ep("train", "--config", str(config), *ground.overrides, *_own(run_dir))
    training = Training(ground.command(words), ground.env, folder, folder / f"{name}.log")
    return stack.enter_context(training), stack.enter_context(Observer(run_dir))


def _own(run_dir: Path) -> list[str]:
    """What a run has for itself, also where the configuration names a place for checkpoints."""
    return [f"run_dir={run_dir}", "checkpoint.dir="]


def _first_step(training: Training, observer: Observer) -> None:
    while not observer.steps:
        if training.status is not None:
            kind = BadInput if training.status == _BAD_INPUT else RayEPError
            raise kind(f"the run made no step: {training.words()}")
        time.sleep(_LOOK_S)


def _tried(faults: Faults, fault: Fault, now: float, last: bool) -> Injected | None:
    """What became of a fault; None: it is tried again, until the next one is due."""
    try:
        return Injected(fault, now, *faults.inject(fault))
    except NotNow as e:
        return Injected(fault, now, "", skipped=str(e)) if last else None
    except ClusterError as e:
        return Injected(fault, now, "", skipped=str(e))


def _told(outcome: Injected, began: float, steps: Sequence[Step]) -> str:
    what = f"skipped: {outcome.skipped}" if outcome.skipped else outcome.words
    return f"{outcome.at - began:6.1f} s, step {steps[-1].number}: {outcome.fault.kind.value}: {what}"
