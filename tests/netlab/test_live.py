"""A run on shaped links whose experts move by themselves: started contiguous, sped up, and kept off a link that slows.

Nothing here places an expert: `ray-ep train` does, with `placement.every`. The lab's links are changed under it, and
what it did is read from its own metrics.jsonl and events.jsonl.
"""

import json
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from subprocess import PIPE, STDOUT, Popen, check_output

import pytest

from ray_ep.placement.planner import plan as planner

from .conftest import command, needs_root, netlab
from .runs import FOUR, RAY_EP, RUN, TWO, lines
from .skewed import write

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.lab, pytest.mark.timeout(400)]

STEPS, EVERY, WITHIN = 52, 5, 20
"""Steps of the run; between two looks at the placement; within which a slowed link must have been planned around."""
SLOW, SLOWED, USUAL = ("h0", "h2"), "10mbit", FOUR["default"]
"""The link that slows, in both directions. Ranks are numbered by host: it joins ranks 0 and 2."""
ENOUGH = 7
"""Steps after a change that are compared, where no event says earlier that it is time."""


@dataclass
class Live:
    """What a run that was watched did: its lines, and after which steps the lab's link slowed and was restored."""

    folder: Path
    slowed: int = 0
    restored: int = 0

    @property
    def metrics(self):
        return lines(self.folder / "metrics.jsonl")

    def said(self, kind, word=""):
        """(Number of the event, message) of a kind that contain a word."""
        events = enumerate(lines(self.folder / "events.jsonl"))
        return [(n, e["message"]) for n, e in events if e["kind"] == kind and word in e["message"]]

    def moves(self):
        """Steps after which experts had moved."""
        return [a["step"] for a, b in pairwise(self.metrics) if a["placement_version"] < b["placement_version"]]

    def seconds(self, after, until):
        """Median seconds of the steps `after` + 1 to `until`."""
        return median(m["step_seconds"] for m in self.metrics if after < m["step"] <= until)


def train(path, options):
    """Start `ray-ep train` on a lab's first host."""
    return Popen(command("exec", path, "--", *RAY_EP, "train", *options), stdout=PIPE, stderr=STDOUT, text=True)


def until(process, condition):
    """Wait for a condition as long as the process runs."""
    while process.poll() is None and not condition():
        time.sleep(0.02)


def ended(process):
    """The process ends well."""
    words = process.communicate(timeout=200)[0]
    assert process.returncode == 0, words[-2000:]


@pytest.fixture(scope="module")
def runs(make_lab, tmp_path_factory):
    """(A run whose experts move and whose link slows and recovers, one of the same steps whose experts stay)."""
    planner.warm()  # no decision waits for a compiler
    path, lab = make_lab(4, FOUR)
    netlab("up", path)
    folder = tmp_path_factory.mktemp("live")
    options = [*write(folder), *RUN.split(), f"optim.steps={STEPS}"]
    live = Live(folder / "live")
    with train(path, [*options, f"run_dir={live.folder}", f"placement.every={EVERY}"]) as process:
        until(process, lambda: live.said("rebalance", "measured after the move"))
        netlab("shape", path, *SLOW, SLOWED)
        live.slowed = len(live.metrics)
        until(process, lambda: len(live.metrics) >= min(live.slowed + WITHIN, replanned(live) + ENOUGH))
        netlab("shape", path, *SLOW, USUAL)
        live.restored = len(live.metrics)
        ended(process)
    for a, b in {(min(p), max(p)) for p in lab.pairs()}:
        netlab("shape", path, a, b, "10gbit")  # losses do not depend on links, and this one need not wait for them
    still = Live(folder / "still")
    with train(path, [*options, f"run_dir={still.folder}", "placement.every=0"]) as process:
        ended(process)
    netlab("down", path)
    return live, still


def compare(live, first, last):
    """Measured over predicted exchange: before the move of step `first`, and after it until step `last`."""
    command_line = [*RAY_EP, "simulate", live.folder, "--placement", "contiguous,plan", "--level", "rank", "--json"]
    found = [json.loads(line) for line in check_output([str(x) for x in command_line], text=True).splitlines()[:2]]
    ratios = []
    for row, (after, until) in zip(found, ((1, first), (first, last)), strict=True):
        exchange = median(m["exchange_seconds"] for m in live.metrics if after < m["step"] <= until)
        print(f"exchange {row['placement']}: predicted {row['traffic_seconds']:.3f} s, measured {exchange:.3f} s")
        ratios.append(exchange / row["traffic_seconds"])
    return ratios


def replanned(live):
    """The step after which experts first moved on a plan that was asked for since links had changed; else STEPS."""
    for _, words in live.said("rebalance", "links have changed)"):
        asked = int(re.search(r"\(asked after step (\d+): ", words)[1])
        if words.startswith("move ") and (moved := [m for m in live.moves() if m > asked]):
            return moved[0]
    return STEPS


def test_experts_that_move_by_themselves_make_steps_one_and_a_half_times_as_fast(runs):
    live, _ = runs
    first = live.moves()[0]
    before, after = live.seconds(1, first), live.seconds(first, live.slowed)
    print(f"step {before:.3f} s contiguous, {after:.3f} s after the move of step {first}")
    assert len([m for m in live.metrics if m["placement_version"] == 0]) == first >= EVERY
    assert before > 1.5 * after


def test_simulating_the_lab_predicts_what_the_exchange_took(runs):
    live, _ = runs
    contiguous, _ = compare(live, live.moves()[0], live.slowed)  # the run's plan is not the one that is simulated
    assert 0.75 < contiguous < 1.5


def test_losses_are_those_of_a_run_that_never_moves(runs):
    live, still = runs
    assert {m["placement_version"] for m in still.metrics} == {0}
    assert [m["step"] for m in live.metrics] == [m["step"] for m in still.metrics] == list(range(1, STEPS + 1))
    losses = [m["loss"] for m in still.metrics]
    assert losses[-1] < losses[0] - 0.5  # it learns
    apart = max(abs(a["loss"] / b - 1) for a, b in zip(live.metrics, losses, strict=True))
    print(f"largest relative difference of losses {apart:.1e}")
    assert apart < 1e-4


def test_a_link_that_slows_is_named_and_planned_around_within_twenty_steps(runs):
    live, _ = runs
    message = live.said("topology", "times slower")[0][1]
    noticed = int(re.match(r"after step (\d+): ", message)[1])
    assert "the link from rank 0 to rank 2 is " in message
    assert "the link from rank 2 to rank 0 is " in message
    moved = replanned(live)
    slow, after = live.seconds(live.slowed + 1, noticed), live.seconds(moved, live.restored)
    print(f"slowed after step {live.slowed}, noticed after {noticed}, experts moved after {moved}")
    print(f"step {slow:.3f} s slowed, {after:.3f} s after the move")
    assert live.slowed < noticed <= moved <= live.slowed + WITHIN
    assert slow > 1.2 * after


def test_a_link_that_recovers_is_noticed(runs):
    live, _ = runs
    found = [int(re.match(r"after step (\d+): ", words)[1]) for _, words in live.said("topology", "times faster")]
    print(f"restored after step {live.restored}, noticed after {found}")
    assert any(live.restored < step <= live.restored + WITHIN for step in found)
    assert live.said("rebalance-alert") == []


def test_two_hosts_of_two_ranks_are_sped_up_too_and_no_link_is_said_to_have_changed(make_lab, tmp_path):
    planner.warm()
    path, _ = make_lab(2, TWO, ranks=2)
    netlab("up", path)
    live = Live(tmp_path / "live")
    options = [*write(tmp_path), *RUN.split(), "exchange.kind=two_level", "batch.sequences=24", "optim.steps=28"]
    with train(path, [*options, f"run_dir={live.folder}", f"placement.every={EVERY}"]) as process:
        ended(process)
    netlab("down", path)
    first = live.moves()[0]
    before, after = live.seconds(1, first), live.seconds(first, live.metrics[-1]["step"])
    print(f"step {before:.3f} s contiguous, {after:.3f} s after the move of step {first}")
    assert before > 1.3 * after
    assert live.said("topology", "times ") == []
    lanes = json.loads((live.folder / "topology.json").read_text())["lanes"]
    assert max(lanes) < 1.5  # of 2 ranks; the shaper lets a first burst pass
    contiguous, _ = compare(live, first, live.metrics[-1]["step"])
    assert 0.75 < contiguous < 1.5
