"""Requests from threads and whoever looks: one queue, in order, each taken once and answered once."""

import threading

import pytest

from ray_ep.driver.requests import Request, RequestKind, Requests, Why


def request(by="me", **more):
    return Request(RequestKind.REBALANCE, by, **more)


def test_what_was_put_is_taken_once_in_order_whatever_thread_it_came_from():
    requests = Requests()
    threads = [
        threading.Thread(target=lambda t=t: [requests.put(request(f"{t}-{n}")) for n in range(200)]) for t in range(4)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    taken = [r.by for r in requests.take()]
    assert len(taken) == 800
    for t in range(4):
        assert [by for by in taken if by.startswith(f"{t}-")] == [f"{t}-{n}" for n in range(200)]
    assert requests.take() == []


def test_whoever_is_looked_at_may_put_what_it_has_seen():
    requests = Requests(lambda: requests.put(request("a signal")))
    assert [r.by for r in requests.take()] == ["a signal"]


def test_a_request_that_was_given_up_before_it_was_taken_is_not_taken():
    requests = Requests()
    first, second = request("first"), request("second")
    requests.put(first)
    requests.put(second)
    assert first.answer.cancel()
    assert requests.take() == [second]
    assert second.begin()
    assert not second.answer.cancel(), "it was begun"
    assert not first.begin()


def test_an_answer_is_told_once():
    asked = request()
    asked.tell("done", value=7)
    asked.tell("refused", Why.NEVER)
    assert (asked.answer.result().words, asked.answer.result().value) == ("done", 7)
    cancelled = request()
    cancelled.answer.cancel()
    cancelled.tell("too late")
    assert cancelled.answer.cancelled()


def test_at_the_end_all_that_wait_are_answered_and_so_is_whoever_comes_later():
    requests = Requests()
    queued, taken, done = request("queued"), request("taken"), request("done")
    requests.put(taken)
    requests.take()
    requests.put(done)
    requests.take()[0].tell("it is done")
    requests.put(queued)
    requests.close("the run has ended")
    late = request("late")
    requests.put(late)
    for it in (queued, taken, late):
        assert (it.answer.result().refused, it.answer.result().words) == (Why.ENDED, "the run has ended")
    assert done.answer.result().words == "it is done"


@pytest.mark.parametrize(
    ("guards", "says"),
    [
        ({}, ""),
        ({"if_epoch": 3, "if_version": 8}, ""),
        ({"if_epoch": 2}, "if_epoch=2: the run is in epoch 3"),
        ({"if_version": 0}, "if_placement_version=0: the placement has version 8"),
    ],
)
def test_a_request_may_name_the_epoch_and_the_placement_that_it_is_meant_for(guards, says):
    assert request(**guards).outdated(3, 8) == says
