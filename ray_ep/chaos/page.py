"""The page of a disturbed run, and its figures in words. Imports the pages' common layout."""

from __future__ import annotations

from collections.abc import Sequence

from ray_ep.chaos.report import Injected, Report, Spread, answer
from ray_ep.chaos.run import Found
from ray_ep.observe.page.sheet import Lines, sheet_page

HEAD = ("seconds", "median", "maximum", "of")
"""Heads of the table of clocks."""
LEGEND = (
    "detect: from the lost rank's last sign of life until the others were released; decide: until it is known where "
    "all go on; regroup: the new group; restore: the snapshot and the move of experts; first step: the one after that; "
    "next step: from the fault itself to the next finished step; all again: to the first on as many ranks as before; "
    "switch: ranks come and go between two steps"
)
"""What the clocks are."""


def html(found: Found) -> str:
    """The page."""
    table = [HEAD, *rows(found.report)]
    charts = [_time_line(found), _ranks(found), _losses(found)]
    verdict = ("Verdict", verdict_of(found.report))
    return sheet_page("A disturbed run", facts(found.report), table, LEGEND, verdict, charts)


def facts(counted: Report) -> list[str]:
    """The figures but for the clocks, in sentences."""
    injected = ", ".join(f"{n} {kind}" for kind, n in counted.injected.items()) or "none"
    skipped = ", ".join(f"{n} {kind}" for kind, n in counted.skipped.items())
    repeated, ranks = counted.repeated, counted.ranks
    again = f"{repeated.most:.1e} (step {repeated.step})" if repeated.count else "none"
    return [
        f"faults: {sum(counted.injected.values())} ({injected}), one every {counted.between_s:.1f} s"
        + (f"; skipped: {skipped}" if skipped else ""),
        f"steps: {counted.steps} in {counted.wall_s:.1f} s, {len(counted.lost)} lost, {counted.again} made again",
        f"ranks: {ranks.fewest} to {ranks.most}; {ranks.lost} lost in {counted.recoveries} recoveries, {ranks.planned} "
        f"left as planned, {ranks.came} came",
        f"largest relative difference of a loss: {counted.against.most:.1e} (step {counted.against.step}, of "
        f"{counted.against.count} compared); of steps made again, to their first time: {again}",
        f"ETTR {counted.ettr:.3f}: time of the steps that counted, over all; at the undisturbed run's "
        f"{counted.undisturbed_step_s:.3f} s a step it is {counted.speed:.3f}",
    ]


def rows(counted: Report) -> list[tuple[str, str, str, str]]:
    """The table of clocks."""
    return [(name.replace("_", " "), *_cells(spread)) for name, spread in counted.clocks.items()]


def verdict_of(counted: Report) -> list[str]:
    """Whether anything was lost, in sentences."""
    return counted.problems or [
        f"no step is lost, losses are those of the undisturbed run within {counted.tolerance:g}"
    ]


def _cells(spread: Spread) -> tuple[str, str, str]:
    return f"{spread.median:.2f}", f"{spread.most:.2f}", str(spread.count)


def _time_line(found: Found) -> Lines:
    """Step over seconds, and the number of ranks; a mark for each fault, until the next finished step where ranks were
    lost."""
    steps = found.disturbed.seen.steps
    began = steps[0].at if steps else 0.0
    marks = [
        (fault.at - began, fault.fault.kind.value, None if end is None else fault.at - began + end)
        for fault, end in _answers(found)
    ]
    title = "Steps over time, with faults; a drop is where steps were made again"
    return Lines(title, {"step": [(s.at - began, float(s.number)) for s in steps]}, "seconds", "step", marks=marks)


def _ranks(found: Found) -> Lines:
    """Ranks over seconds."""
    steps = found.disturbed.seen.steps
    began = steps[0].at if steps else 0.0
    points = {"ranks": [(s.at - began, float(s.ranks)) for s in steps]}
    return Lines("Ranks over time", points, "seconds", "ranks", low=0.0, stairs=("ranks",))


def _answers(found: Found) -> Sequence[tuple[Injected, float | None]]:
    done = [f for f in found.disturbed.faults if not f.skipped]
    return [(f, answer(f, found.disturbed.seen) if f.fault.deadly else None) for f in done]


def _losses(found: Found) -> Lines:
    counts = {s.number: s.loss for s in found.disturbed.seen.steps}
    curves = {
        name: [(float(n), curve[n]) for n in sorted(curve) if n in counts]
        for name, curve in (("undisturbed", found.undisturbed.loss), ("disturbed", counts))
    }
    return Lines("Loss, disturbed and not", curves, "step", "nats per token")
