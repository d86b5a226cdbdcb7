"""Writes report.html: the page of a run as one file, made from its directory alone, by anybody who sees that."""

from __future__ import annotations

import os
from pathlib import Path

from ray_ep.observe.page.data import History, layers
from ray_ep.observe.page.html import whole_page
from ray_ep.observe.page.summary import summary
from ray_ep.observe.state import RunState


def write_report(run_dir: Path, running: bool = False) -> Path:
    """Write `run_dir`/report.html and return its path; what the run lacks is left out.

    The page replaces an older one in one move, so a reader never sees half of it.

    Args:
        running: the run goes on; the page says so.

    Raises:
        OSError: it cannot be written; the older one stays.
    """
    run_dir = Path(run_dir)
    state = RunState(run_dir)
    snapshot = state.snapshot()
    snapshot["run"]["alive"] = running
    snapshot["placement"] |= {"slots": [], "primary": [], "since": []}  # they are in `placements`
    data = {
        "state": snapshot, "summary": summary(state, running), "placements": History(state).after(),
        "layers": layers(state),
    }  # fmt: skip
    path = run_dir / "report.html"
    unfinished = path.with_name(".report.html.unfinished")
    try:
        unfinished.write_text(whole_page(snapshot["run"]["name"], data), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # half a page on a disk that is full
        raise
    return path
