"""The page of a run that goes, in a real browser: figures as in metrics.jsonl, and a move that is seen to arrive."""

import json
from pathlib import Path

import pytest

import ray_ep

pytestmark = pytest.mark.slow
PACKAGE = str(Path(ray_ep.__file__).parent.parent)

RUN = """
import json, sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
import ray
ray.init(address=sys.argv[2], log_to_driver=False)
import ray_ep
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.interrupt import Interrupt
from ray_ep.driver.loop import Driver
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.requests import Requests
from ray_ep.driver.start import check_run
from ray_ep.observe.page.serving import served
from ray_ep.placement.planner.verdict import Verdict

cfg = ray_ep.load_config(None, json.loads(sys.argv[1]))
plan = check_run(cfg, datetime.now())
ranks = Ranks(cfg.cluster, "live", False, Interrupt())
try:
    with Publisher([plan.run]) as publisher, served(plan.run.path, cfg.observe, print) as shown:
        driver = Driver(cfg, plan, ranks, publisher, Requests())
        driver.form()
        Path("address").write_text(shown.address)
        while not Path("move").exists():
            driver.step_with_recovery()
        old = driver.mover.placement
        slots = old.slots.copy()
        slots[1, 0, 0], slots[1, 1, 0] = old.slots[1, 1, 0], old.slots[1, 0, 0]
        new = replace(old, slots=slots, primary=None, shares=None, version=old.version + 1)
        driver.mover.move(Verdict(new, "move 2 experts: somebody asked for it", 0.01), driver.done)
        while not Path("end").exists():
            driver.step_with_recovery()
finally:
    ranks.kill()
ray.shutdown()
"""


@pytest.mark.usefixtures("browser")  # first: without one, no cluster is started
def test_the_page_follows_a_run_and_shows_a_move_when_it_comes(opened, here, cluster, lines):
    command = here.start(
        "python",
        "-c",
        RUN,
        json.dumps(
            [
                *here.tiny(
                    "run_dir=run",
                    "optim.steps=100000",
                    "eval.every=0",
                    "cluster.cpus_per_rank=0.5",
                    "placement.every=0",
                )
            ]
        ),
        cluster.driver,
        PYTHONPATH=PACKAGE,
    )
    address = here.path / "address"
    command.until(lambda: address.exists() and address.read_text(), 200, "the run")
    tab = opened(address.read_text())
    tab.wait_for_function("() => window.page && page.view.state.steps.step.length > 3 && page.overview?.chart.view")
    steps, losses = tab.evaluate("[page.view.state.steps.step, page.view.state.steps.columns.loss]")
    written = {line["step"]: line["loss"] for line in lines(here.path / "run" / "metrics.jsonl")}
    assert losses == [written[step] for step in steps]
    assert tab.inner_text("#status").startswith("stepping, step ")
    assert tab.evaluate("page.view.version") == 0

    (here.path / "move").touch()
    tab.wait_for_function("() => page.view.version === 1")
    moved = tab.evaluate("page.source.placements.moved(1).map((m) => [m.layer, m.expert, m.from, m.rank])")
    assert sorted(moved) == [[1, 0, [0], 1], [1, 4, [1], 0]]
    tab.wait_for_function("() => document.getElementById('story').textContent.includes('somebody asked for it')")

    before = tab.evaluate("page.view.state.steps.step.at(-1)")
    tab.wait_for_function(f"() => page.view.state.steps.step.at(-1) > {before}")  # and goes on
    (here.path / "end").touch()
    assert command.wait(200) == 0, command.err
    opened.complaints.clear()  # of a browser whose server has gone
    tab.wait_for_function(
        "() => document.getElementById('status').textContent.startsWith('The driver does not answer')"
    )
    tab.context.close()
    opened.complaints.clear()
