"""Where the page of a run is, from its directory alone."""

from __future__ import annotations

import socket
from pathlib import Path

from ray_ep.driver.run.claim import last_holder
from ray_ep.errors import BadInput
from ray_ep.observe.state import RunState


def address_of(run_dir: Path) -> tuple[str, str]:
    """Address of a run's page for a browser, and what is to be known of it, "" for nothing.

    Raises:
        BadInput: there is no run, or one without a page.
    """
    if not (run_dir / "config.yaml").is_file():
        raise BadInput(f"{str(run_dir)!r} is not a run directory: it has no config.yaml")
    state = RunState(run_dir)
    run, told = state.snapshot("run")["run"], state.standing.page
    if run["alive"] is not False and told.get("address"):
        host = last_holder(run_dir).get("host")
        here = not host or host == socket.gethostname()
        seen = told.get("dashboard")
        words = (
            "" if here else f"the run is on {host}: from here, `ssh -L` to the port of this address, or Ray's dashboard"
        )
        return (seen, "") if seen and not here else (told["address"], words)
    report = (run_dir / "report.html").absolute()
    if not report.is_file():
        raise BadInput(f"{str(run_dir)!r}: the run has no page now, and no report.html")
    return report.as_uri(), "the run has ended: this is its report"
