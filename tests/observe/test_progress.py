"""The plain lines of a run that nobody watches, and the live bar on a terminal."""

import io
import re

import pytest

from ray_ep.driver.records import Event
from ray_ep.observe.progress import Progress
from tests.records import record


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def measured(step, **more):
    base = {"loss": 2.10341, "tokens_per_second": 13012.4, "exchange_seconds": 0.03, "step_seconds": 0.25}
    return record(step, **{"balancedness": 0.831, **base, **more})


def lines_of(run, **options):
    stream, clock = io.StringIO(), Clock()
    with Progress(150, stream, clock=clock, **options) as progress:
        run(progress, clock)
    return stream.getvalue().splitlines()


def test_a_plain_line_names_every_figure():
    assert lines_of(lambda p, _: p.step(measured(20))) == [
        "step=20/150 loss=2.1034 tokens_per_second=13012 exchange=12% balancedness=0.83"
    ]


def test_the_newest_held_out_loss_stays_in_sight():
    def run(progress, clock):
        progress.step(measured(1, loss=3.0, eval_loss=3.5))
        clock.now += 5
        progress.step(measured(2, loss=2.0))

    assert lines_of(run)[-1].startswith("step=2/150 loss=2.0000 eval_loss=3.5000 ")


def test_between_two_plain_lines_pass_five_seconds():
    def run(progress, clock):
        for step in range(1, 151):
            progress.step(measured(step))
            clock.now += 1.0

    shown = [int(re.match(r"step=(\d+)/150", line)[1]) for line in lines_of(run)]
    assert shown == [*range(1, 151, 5), 150]


def test_a_run_that_stops_early_still_shows_its_last_step_once():
    def run(progress, _):
        progress.step(measured(1))
        progress.step(measured(2))
        progress.step(measured(3))

    assert [line.split()[0] for line in lines_of(run)] == ["step=1/150", "step=3/150"]


def test_an_event_is_printed_at_once():
    stream = io.StringIO()
    with Progress(10, stream, clock=Clock()) as progress:
        progress.start(Event("start", "training"))
        progress.event(Event("rank_lost", "rank 1 died"))
        assert stream.getvalue() == "start training\nevent kind=rank_lost rank 1 died\n"


def test_what_the_command_ends_with_itself_is_not_said_twice():
    assert lines_of(lambda p, _: p.event(Event("failed", "rank 1 died"))) == []


def test_every_plain_line_carries_the_prefix():
    def run(progress, _):
        progress.start(Event("start", "training"))
        progress.step(measured(1))
        progress.event(Event("rank_lost", "rank 1 died:\nTraceback"))

    lines = lines_of(run, prefix="[router.force=balanced]")
    assert len(lines) == 4
    assert all(line.startswith("[router.force=balanced] ") for line in lines)


def test_an_error_of_the_run_goes_on_to_the_caller():
    with pytest.raises(KeyError, match="mine"), Progress(10, io.StringIO()):
        raise KeyError("mine")


def test_a_terminal_gets_a_bar_with_figures_and_events_under_the_prefix(terminal):
    with Progress(150, terminal, prefix="[router.force=balanced]") as progress:
        progress.start(Event("start", "training"))
        progress.event(Event("rank_lost", "rank 1 died"))
        progress.step(measured(20))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "[router.force=balanced] training" in text
    assert "20/150" in text
    assert "[router.force=balanced] rank_lost: rank 1 died" in text
    assert "[router.force=balanced] loss 2.1034 · tokens/s 13012 · exchange 12%" in text


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(150, terminal) as progress:
        progress.step(measured(20))
    assert terminal.getvalue().startswith("step=20/150 loss=2.1034")
