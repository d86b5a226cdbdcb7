"""Where a step's time goes: from metrics.jsonl to the bar and the table of the page."""

import json
import math

import pytest

from ray_ep.observe.breakdown import breakdown, in_groups
from ray_ep.observe.page.summary import summary
from ray_ep.observe.state import RunState

SECONDS = {
    "data": 0.001, "forward": 0.040, "dispatch_forward": 0.005, "exchange_forward": 0.015, "experts_forward": 0.030,
    "backward": 0.060, "dispatch_backward": 0.005, "exchange_backward": 0.020, "experts_backward": 0.050,
    "reduce": 0.010, "norm": 0.001, "update": 0.015, "publish": 0.003, "rest": 0.002, "driver": 0.003,
}  # fmt: skip


def run_of(folder, *steps):
    """A run whose steps hold these figures."""
    lines = (json.dumps({"step": n, **figures}) + "\n" for n, figures in enumerate(steps, 1))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def told_of(folder, *steps):
    """What the page says of such a run."""
    return summary(RunState(run_of(folder, *steps)), running=False)


def seconds_of(folder, *phases):
    return {p.name: p.seconds for p in breakdown(RunState(run_of(folder, *({"phase_seconds": p} for p in phases))))}


def test_the_page_shows_a_bar_and_each_phase_with_its_time_share_and_meaning(tmp_path):
    told = told_of(tmp_path, {"phase_seconds": SECONDS, "peak_mib": 812})
    assert told["breakdown"].startswith("Model outside the experts 38%, experts 31%, exchange 13%, gradients and")
    assert [p["name"] for p in told["phases"]] == list(SECONDS)
    (phase,) = [p for p in told["phases"] if p["name"] == "exchange_backward"]
    assert (phase["seconds"], round(phase["share"], 3)) == (0.02, 0.077)
    assert phase["words"] == "messages between ranks, backward, waiting for other ranks included"
    assert {"label": "Peak memory", "value": "812 MiB", "note": "of the largest rank"} in told["headlines"]


def test_a_run_that_tells_no_phases_has_neither_section_nor_peak(tmp_path):
    told = told_of(tmp_path, {"loss": 2.0})
    assert (told["phases"], told["breakdown"]) == ([], "")
    assert "Peak memory" not in [h["label"] for h in told["headlines"]]


def test_the_median_is_of_the_newest_half_of_the_steps_that_tell(tmp_path):
    run = run_of(tmp_path, *({"phase_seconds": {"data": s}} for s in (900, 800, 1, 2, 30)), {"loss": 2.0})
    (data, *others) = breakdown(RunState(run))
    assert (data.name, data.seconds, data.share) == ("data", 2, 1)
    assert not any(p.seconds for p in others)


def test_of_a_long_run_the_newest_thousand_steps_count(tmp_path):
    steps = ({"phase_seconds": {"data": s}} for s in range(5000))
    assert breakdown(RunState(run_of(tmp_path, *steps)))[0].seconds == pytest.approx(4499.5)


def test_a_phase_that_a_step_lacks_took_it_no_time(tmp_path):
    assert seconds_of(tmp_path, {"data": 1}, {"data": 1}, {"data": 1, "norm": 4}, {"data": 3})["norm"] == 2
    last_without_any = {"data": 1}, {"data": 1, "norm": 4}, {}
    assert seconds_of(tmp_path, *last_without_any)["norm"] == 4


def test_phases_of_no_known_name_come_last_under_their_name_as_it_is(tmp_path):
    formula, odd = "$\\frac{1$", "<b>\u4e2d\x07"
    run = run_of(tmp_path, {"phase_seconds": {formula: 0.25, odd: 0.25, "data": 0.5}})
    phases = breakdown(RunState(run))
    assert [p.name for p in phases] == [*SECONDS, formula, odd]
    assert in_groups(phases).startswith(f"Rest 50%, {formula} 25%, ")


BAD = {"a string": "1", "null": None, "NaN": math.nan, "infinite": math.inf, "negative": -1.0, "a list": [1.0],
       "an object": {"a": 1}, "huge": 10**400}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_is_no_time_is_left_out_of_the_median(tmp_path, bad):
    old, new = [{"data": 9.0}] * 4, [{"data": 1.0}, {"data": bad}, {"data": bad}, {"data": 3.0}]
    assert seconds_of(tmp_path, *old, *new)["data"] == 2.0
    assert seconds_of(tmp_path, {"data": bad}) == {}
    told = told_of(tmp_path, {"phase_seconds": bad, "peak_mib": bad}, {"phase_seconds": {"data": bad, "norm": 1.0}})
    assert {p["name"]: p["seconds"] for p in told["phases"]}["norm"] == 1.0
    assert "Peak memory" not in [h["label"] for h in told["headlines"]]


@pytest.mark.parametrize(("mib", "shown"), [((700, 812, 300), "812 MiB"), ((2048, "x", -1), "2.0 GiB")])
def test_the_peak_is_the_greatest_of_the_run(tmp_path, mib, shown):
    told = told_of(tmp_path, *({"peak_mib": m} for m in mib))
    assert shown in [h["value"] for h in told["headlines"]]
