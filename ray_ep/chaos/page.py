"""The page of a disturbed run, and its figures in words. Imports matplotlib, and the pages' common layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_ep.chaos.report import Injected, Report, Spread, answer
from ray_ep.chaos.run import Found
from ray_ep.chaos.schedule import Kind
from ray_ep.observe.figures import BLUE, GREEN, GREY, ORANGE, _figure, _finish
from ray_ep.observe.plan_page import page

_COLOURS = {
    Kind.KILL: "#d1495b", Kind.NODE: "#7b2d8b", Kind.STOP: ORANGE, Kind.CUT: "#1b2128", Kind.SLOW: "#b58900",
    Kind.DRAIN: "#0f8b8d", Kind.ADD: GREEN,
}  # fmt: skip
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
    maps = [
        ("timeline", "Steps over time, with faults; a drop is where steps were made again", _time_line(found)),
        ("loss", "Loss, disturbed and not", _losses(found)),
    ]
    verdict = verdict_of(found.report)
    return page(facts(found.report), table, LEGEND, verdict, maps, "A disturbed run", "Verdict")


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


def _time_line(found: Found) -> str:
    """Step over seconds; a line for each fault, a band from it to the next finished step where ranks were lost."""
    steps = found.disturbed.seen.steps
    figure, axes = _figure((12.4, 4.2))
    began = steps[0].at if steps else 0.0
    axes.plot([s.at - began for s in steps], [s.number for s in steps], color=BLUE, linewidth=1.4, label="steps")
    told: set[Kind] = set()
    for fault, end in _answers(found):
        kind = fault.fault.kind
        axes.axvline(
            fault.at - began, color=_COLOURS[kind], linewidth=1.0, label="" if kind in told else kind.value, alpha=0.9
        )
        told.add(kind)
        if end is not None:
            axes.axvspan(fault.at - began, fault.at - began + end, color=_COLOURS[kind], alpha=0.18, linewidth=0)
    ranks = axes.twinx()
    ranks.step([s.at - began for s in steps], [s.ranks for s in steps], where="post", color=GREY, linewidth=0.9)
    ranks.set_ylim(0, 1.0 + max((s.ranks for s in steps), default=1))
    ranks.set_ylabel("ranks", color=GREY)
    ranks.tick_params(colors=GREY, labelcolor=GREY)
    for spine in ranks.spines.values():
        spine.set_visible(False)
    return _finish(figure, axes, "timeline", "step", x="seconds", legend="upper left")


def _answers(found: Found) -> Sequence[tuple[Injected, float | None]]:
    done = [f for f in found.disturbed.faults if not f.skipped]
    return [(f, answer(f, found.disturbed.seen) if f.fault.deadly else None) for f in done]


def _losses(found: Found) -> str:
    counts = {s.number: s.loss for s in found.disturbed.seen.steps}
    figure, axes = _figure((12.4, 3.0))
    for label, curve, color, width in (
        ("undisturbed", found.undisturbed.loss, ORANGE, 2.6), ("disturbed", counts, BLUE, 1.0),
    ):  # fmt: skip
        x = sorted(n for n in curve if n in counts)
        axes.plot(x, np.array([curve[n] for n in x]), color=color, linewidth=width, label=label)
    return _finish(figure, axes, "loss", "nats per token")
