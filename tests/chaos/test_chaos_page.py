"""The page of a disturbed run, and its figures in words."""

from ray_ep.chaos.observer import Recovery, Step
from ray_ep.chaos.page import facts, html, rows, verdict_of
from ray_ep.chaos.report import Curve, Injected, Seen, report
from ray_ep.chaos.run import Disturbed, Found
from ray_ep.chaos.schedule import Fault, Kind
from tests.browser import data_of

SECONDS = {"detect": 0.2, "decide": 0.1, "regroup": 0.1, "restore": 0.5, "first_step": 1.0}
STEPS = [
    *(Step(float(n), n, 3.0 - 0.1 * n, 0.9, 0, 4) for n in range(1, 6)),
    *(Step(n + 4.0, n, 3.0 - 0.1 * n, 0.9, 1, 3) for n in range(4, 10)),
]
RECOVERIES = [Recovery(7.9, ("rank-1",), 1, 3, 2, SECONDS, "rank 1 died")]


def found(curve=None, faults=True):
    did = [
        Injected(Fault(0, Kind.KILL, 4.0, 0.1, 0.9), 5.5, "SIGKILL to rank 1", ("rank-1",)),
        Injected(Fault(1, Kind.ADD, 8.0, 0.1, 0.9), 8.5, "one node more"),
        Injected(Fault(2, Kind.NODE, 9.0, 0.1, 0.9), 9.5, "", skipped="1 rank left"),
    ]
    run = Disturbed(Seen(STEPS, RECOVERIES, failures=1), did if faults else [], "")
    curve = curve or Curve({s.number: s.loss for s in STEPS}, 0.8)
    return Found(report(run.seen, run.faults, curve, 1e-5), run, curve)


def test_the_page_has_the_figures_the_clocks_and_the_time_line_and_needs_nothing_else():
    page = data_of(html(found()))
    assert any("ETTR" in note for note in page["notes"])
    assert ["next step after kill", "2.50"] in [row[:2] for row in page["rows"]]
    assert page["words"] == ["no step is lost, losses are those of the undisturbed run within 1e-05"]
    steps, ranks, losses = page["charts"]
    assert [(m["name"], m["x"], m["until"]) for m in steps["marks"]] == [("kill", 4.5, 7.0), ("add", 7.5, None)]
    assert steps["curves"][0]["y"] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    assert ranks["curves"][0]["y"][-1] == 3
    assert [curve["name"] for curve in losses["curves"]] == ["undisturbed", "disturbed"]


def test_a_run_without_faults_and_without_steps_can_be_drawn():
    assert "one every inf s" in html(found(faults=False))
    nothing = Disturbed(Seen(), [], "")
    empty = Found(report(Seen(), [], Curve({}, 0.0), 1e-5), nothing, Curve({}, 0.0))
    assert "no step can be compared" in html(empty)


def test_words_tell_kinds_steps_and_differences():
    counted = found().report
    text = "\n".join(facts(counted))
    assert "faults: 2 (1 kill, 1 add), one every 6.0 s; skipped: 1 node" in text
    assert "9 in 12.0 s, 0 lost, 2 made again" in text
    assert "ranks: 3 to 4; 1 lost in 1 recoveries, 0 left as planned, 0 came" in text
    assert ("restore", "0.50", "0.50", "1") in rows(counted)
    assert verdict_of(counted) == ["no step is lost, losses are those of the undisturbed run within 1e-05"]


def test_a_verdict_names_what_went_wrong():
    (words,) = verdict_of(found(Curve({5: 2.0}, 0.8)).report)
    assert words.startswith("the loss of step 5 is 2.5e-01 from the undisturbed run's")
