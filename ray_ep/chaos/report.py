"""What a disturbed run lost, counted from what was seen of it. Pure: no files, no clock.

ETTR, effective training time ratio: the time of the steps that counted, each once and as long as it took then, over all
the time from the first step to the last. It is the share of the time that was not lost to faults: waiting for silent
ranks, recovering, and making steps again. That fewer ranks step more slowly is not in it: `speed` has that, the same
steps at the undisturbed run's median over the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ray_ep.chaos.observer import Recovery, Step, Switch
from ray_ep.chaos.schedule import Fault, counted

UNHURT_S = 10.0
"""A run that makes steps for so long after a fault has lost nobody: ranks without a raylet live for up to 3 s."""
CLOCKS = ("detect", "decide", "regroup", "restore", "first_step")
"""Clocks of a recovery, as its event has them."""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault of the schedule and what became of it.

    Args:
        at: when it was carried out, or given up.
        words: what was done. members: of the run, that it hit. skipped: why nothing was done; "": it was.
    """

    fault: Fault
    at: float
    words: str
    members: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and maximum of a time in seconds, over `count` of them."""

    median: float
    most: float
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest relative difference of two losses, and at which step; over `count` pairs."""

    most: float = 0.0
    step: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Curve:
    """An undisturbed run: its losses by step, and the median seconds of a step."""

    loss: Mapping[int, float]
    step_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A run as it was seen. failures, planned: ranks that it lost, and that left as planned, as it counts them."""

    steps: Sequence[Step] = ()
    recoveries: Sequence[Recovery] = ()
    switches: Sequence[Switch] = ()
    failures: int = 0
    planned: int = 0


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks were lost, left as planned, came; the fewest and the most that a step was made on."""

    lost: int
    planned: int
    came: int
    fewest: int
    most: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was counted.

    Args:
        injected, skipped: faults by kind.
        wall_s: from the first step to the last. steps: that counted. again: made more than once.
        lost: steps that are missing. failed: why the run did not go on to the end; "": it did.
        unanswered: faults that cost ranks, after which no step was finished any more.
        ranks: that were lost, left as planned, and came. between_s: mean time between faults.
        against: losses beside the undisturbed run's. repeated: of steps made again, beside those of the first time.
        clocks: of recoveries; `next step`, from a fault to the next finished step, by kind too; `all again`, to the
            first step on as many ranks as before; `switch`, of ranks that come and go between two steps.
        tolerance: largest difference that passes.
    """

    injected: Mapping[str, int]
    skipped: Mapping[str, int]
    wall_s: float
    steps: int
    again: int
    lost: tuple[int, ...]
    failed: str
    unanswered: tuple[str, ...]
    ranks: Ranks
    between_s: float
    ettr: float
    speed: float
    undisturbed_step_s: float
    against: Difference
    repeated: Difference
    recoveries: int
    clocks: Mapping[str, Spread]
    tolerance: float

    @property
    def problems(self) -> list[str]:
        """What went wrong, in words; empty: nothing was lost."""
        found = [f"the run ended: {self.failed}"] if self.failed else []
        if self.lost:
            found.append(f"steps that are missing: {len(self.lost)}, from {self.lost[0]} on")
        found += [f"no step was finished after {words}" for words in self.unanswered]
        if not self.steps or not self.against.count:
            found.append("no step can be compared")
        for what, difference in (("undisturbed run's", self.against), ("first time's", self.repeated)):
            if not difference.most <= self.tolerance:
                found.append(
                    f"the loss of step {difference.step} is {difference.most:.1e} from the {what}, more than "
                    f"{self.tolerance:g}"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, and numbers without a unit; what is infinite or not a number becomes null."""
        tree: dict[str, Any] = _plain({**asdict(self), "problems": self.problems})
        return tree


def report(seen: Seen, faults: Sequence[Injected], undisturbed: Curve, tolerance: float, failed: str = "") -> Report:
    """Count.

    Args:
        failed: why the run did not go on; "": it was ended from here, or done.
    """
    steps = seen.steps
    done = [f for f in faults if not f.skipped]
    counts = {s.number: s for s in steps}  # of a step that was made again the last one counts
    wall = steps[-1].at - steps[0].at if steps else 0.0
    later = [s for s in counts.values() if s.number != steps[0].number]  # the clock begins when the first is done
    useful = sum(s.seconds for s in later)
    return Report(
        injected=counted(f.fault.kind for f in done),
        skipped=counted(f.fault.kind for f in faults if f.skipped),
        wall_s=wall,
        steps=len(counts),
        again=len(steps) - len(counts),
        lost=tuple(n for n in range(1, max(counts, default=0) + 1) if n not in counts),
        failed=failed,
        unanswered=tuple(f.words for f in done if open_still(f, seen)),
        ranks=_ranks(seen),
        between_s=wall / len(done) if done else math.inf,
        ettr=useful / wall if wall else 0.0,
        speed=len(later) * undisturbed.step_s / wall if wall else 0.0,
        undisturbed_step_s=undisturbed.step_s,
        against=difference({n: s.loss for n, s in counts.items()}, undisturbed.loss),
        repeated=_repeated(steps),
        recoveries=len(seen.recoveries),
        clocks=_clocks(seen, done),
        tolerance=tolerance,
    )


def curve_of(lines: Sequence[tuple[int, float, float]]) -> Curve:
    """A curve of (step, loss, seconds) of each step; the first step, which warms up, does not count for its time."""
    seconds = [s for number, _, s in lines if number > 1]
    return Curve({number: loss for number, loss, _ in lines}, median(seconds) if seconds else 0.0)


def answer(fault: Injected, seen: Seen) -> float | None:
    """Seconds from a fault that costs ranks to the next step that was finished without them; None: there was none."""
    recovery = next((r for r in seen.recoveries if set(r.lost) & set(fault.members)), None)
    if recovery is None:
        return None
    step = next((s for s in seen.steps if s.at >= recovery.at and s.epoch >= recovery.epoch), None)
    return None if step is None else step.at - fault.at


def all_again(fault: Injected, seen: Seen) -> float | None:
    """Seconds from a fault that costs ranks to the first step on as many as before it; None: there was none."""
    next_step = answer(fault, seen)
    if next_step is None:
        return None
    before = next((s.ranks for s in reversed(seen.steps) if s.at <= fault.at), 0)
    step = next((s for s in seen.steps if s.at >= fault.at + next_step and s.ranks >= before), None)
    return None if step is None else step.at - fault.at


def open_still(fault: Injected, seen: Seen) -> bool:
    """Whether a fault that costs ranks is not survived yet. One that hit a rank which had not joined yet costs none."""
    if not fault.fault.deadly or fault.skipped or answer(fault, seen) is not None:
        return False
    return not any(s.at > fault.at + UNHURT_S for s in seen.steps)


def difference(found: Mapping[int, float], expected: Mapping[int, float]) -> Difference:
    """The largest relative difference over the steps that both have."""
    both = sorted(set(found) & set(expected))
    each = {n: _relative(found[n], expected[n]) for n in both}
    worst = max(each, key=lambda n: each[n], default=0)
    return Difference(each.get(worst, 0.0), worst, len(both))


def _repeated(steps: Sequence[Step]) -> Difference:
    """Of steps that were made again: what they gave beside what they gave the time before."""
    before: dict[int, float] = {}
    pairs: list[tuple[float, int]] = []
    for step in steps:
        if step.number in before:
            pairs.append((_relative(step.loss, before[step.number]), step.number))
        before[step.number] = step.loss
    most, number = max(pairs, default=(0.0, 0))
    return Difference(most, number, len(pairs))


def _relative(a: float, b: float) -> float:
    """|a - b| / |b|; infinite where one is not a number."""
    gap = abs(a - b) / abs(b) if b else abs(a - b)
    return gap if math.isfinite(gap) else math.inf


def _ranks(seen: Seen) -> Ranks:
    counts = [s.ranks for s in seen.steps] or [0]
    return Ranks(seen.failures, seen.planned, sum(len(s.come) for s in seen.switches), min(counts), max(counts))


def _clocks(seen: Seen, faults: Sequence[Injected]) -> dict[str, Spread]:
    deadly = [f for f in faults if f.fault.deadly]
    times = [(f.fault.kind.value, answer(f, seen)) for f in deadly]
    kinds = dict.fromkeys(kind for kind, _ in times)
    found: dict[str, list[float | None]] = {name: [r.seconds.get(name) for r in seen.recoveries] for name in CLOCKS}
    found["next step"] = [seconds for _, seconds in times]
    found |= {f"next step after {kind}": [seconds for k, seconds in times if k == kind] for kind in kinds}
    found["all again"] = [all_again(f, seen) for f in deadly]
    found["switch"] = [s.seconds for s in seen.switches]
    known = {name: [s for s in seconds if s is not None] for name, seconds in found.items()}
    return {name: Spread(median(s), max(s), len(s)) for name, s in known.items() if s}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
