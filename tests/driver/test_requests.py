"""Requests from threads, files and whoever looks: one queue, in order, each taken once."""

import threading

from ray_ep.driver.requests import Request, RequestKind, Requests


def request(by):
    return Request(RequestKind.REBALANCE, by)


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


def test_files_are_asked_by_poll_alone_and_the_look_comes_before_each_take():
    asked, looked = [], []
    waiting = [request("a file"), request("another file")]

    def files():
        asked.append(1)
        return waiting.pop(0) if waiting else None

    requests = Requests(lambda: looked.append(1), [files, lambda: None])
    assert requests.take() == []
    assert (len(looked), asked) == (1, [])
    requests.poll()
    assert [r.by for r in requests.take()] == ["a file", "another file"]


def test_whoever_is_looked_at_may_put_what_it_has_seen():
    requests = Requests(lambda: requests.put(request("a signal")))
    assert [r.by for r in requests.take()] == ["a signal"]
