"""The page while the run goes: written beside the steps, at most so often, and never in their way."""

import pytest

from ray_ep.driver.records import Event
from ray_ep.driver.run.rundir import RunDir
from ray_ep.observe import live
from ray_ep.observe.live import EVERY_S, NEWS_S, LivePage
from tests.browser import data_of
from tests.records import record


class Watched:
    """A page of a run in `path` whose clock stands still unless moved; counts the pages that were written."""

    def __init__(self, path):
        self.now, self.told, self.path = 0.0, [], path
        self.page = LivePage(path, self.told.append, lambda: self.now, nice=0)

    def step(self, n, after_s, **figures):
        """A step that ends so many seconds later; whether it began a new page, which is then written."""
        self.now += after_s
        before = self.page._writer
        self.page.step(record(n, loss=2.0, **figures))
        began = self.page._writer is not None and self.page._writer is not before
        if self.page._writer is not None:
            self.page._writer.wait(60)
        return began


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    made.start(Event("start", "a model"))
    return made


def test_a_page_is_written_at_the_start_then_seldom_and_sooner_after_an_evaluation_or_an_event(run, monkeypatch):
    it = Watched(run.path)
    with it.page:
        it.page.start(Event("start", "a model"))
        it.page._writer.wait(60)
        assert data_of((run.path / "report.html").read_text())["state"]["run"]["alive"] is True
        monkeypatch.setattr(live, "_CHILD", "")  # when is the question now: writers of nothing end at once
        assert not it.step(1, 1.0)
        assert not it.step(2, NEWS_S)  # no news
        assert it.step(3, EVERY_S - NEWS_S)
        it.page.event(Event("balance", "off"))
        assert not it.step(4, 1.0)  # too soon
        assert it.step(5, NEWS_S)
        assert it.step(6, NEWS_S, eval_loss=2.0)
        assert not it.step(7, NEWS_S)
    assert it.told == []


def test_a_page_that_cannot_be_written_is_told_once_with_its_reason(run):
    (run.path / "report.html").mkdir()
    it = Watched(run.path)
    with it.page:
        it.page.start(Event("start", "a model"))
        it.page._writer.wait(60)
        it.step(1, EVERY_S)  # whose page fails, too
        it.step(2, 1.0)
    (why,) = it.told
    assert "the run goes on" in why
    assert "report.html" in why


def test_the_step_does_not_wait_for_the_page_and_nobody_writes_it_once_the_run_has_ended(run, monkeypatch):
    monkeypatch.setattr(live, "_CHILD", "import time; time.sleep(600)")  # a page that takes its time
    with LivePage(run.path, pytest.fail) as page:
        page.start(Event("start", "a model"))
        page.step(record(1))
        writer = page._writer
        assert writer.poll() is None, "nobody has waited for it"
    assert writer.returncode is not None
    assert not (run.path / "report.html").exists()
