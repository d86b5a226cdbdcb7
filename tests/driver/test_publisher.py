"""What listeners are handed, from which thread, in which order, and what is waited for."""

import threading

from ray_ep.driver.publisher import Publisher
from ray_ep.driver.records import Event
from tests.driver.fakes import Ear
from tests.records import record


def test_records_come_in_order_from_one_thread_that_is_not_the_callers():
    threads = set()

    class Watched(Ear):
        def event(self, event):
            threads.add(threading.current_thread())
            super().event(event)

    ear = Watched()
    with Publisher([ear]) as publisher:
        publisher.start(Event("start", "a model"))
        for n in range(1, 50):
            publisher.done = n
            publisher.step(record(n))
            publisher.event(Event("note", str(n)))
    assert [e.step for e in ear.heard] == [0, *(n for n in range(1, 50) for _ in range(2))]
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not threads.pop().is_alive()


def test_an_event_that_was_made_before_is_dated_when_it_is_told():
    ear, note = Ear(), Event("router", "made while the run was checked")
    with Publisher([ear]) as publisher:
        publisher.done = 3
        publisher.start(Event("start", "a model"))
        publisher.event(note)
    first, second = ear.heard
    assert note.at < first.at <= second.at
    assert second.step == 3


def test_what_a_listener_says_itself_goes_out_behind_what_it_was_handed_and_before_a_flush_ends():
    class Speaker(Ear):
        def step(self, record):
            publisher.event(Event("page", "could not be written"))

    first, speaker = Ear(), Speaker()
    with Publisher([first, speaker]) as publisher:
        publisher.step(record(1))
        publisher.step(record(2))
        assert publisher.flush(120)
        assert [getattr(x, "kind", "step") for x in first.heard] == ["step", "page", "step", "page"]


def test_a_listener_that_hangs_does_not_keep_a_broken_run_from_its_end(caplog):
    held = threading.Event()

    class Hung(Ear):
        def event(self, event):
            held.wait(120)

    publisher = Publisher([Hung()])
    publisher.event(Event("failed", "rank 1 died"))
    assert not publisher.flush(0.05)
    publisher.close(0.05)
    assert "listeners hang" in caplog.text
    held.set()


def test_after_its_end_it_hands_over_what_comes_at_once():
    ear = Ear()
    publisher = Publisher([ear])
    publisher.close()
    publisher.event(Event("report", "late"))
    assert ear.words("report") == ["late"]
    assert publisher.flush()
