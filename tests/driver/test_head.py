"""Questions to a head that does not answer: nobody waits longer than the limit, and a late answer does no harm."""

import threading

import pytest

from ray_ep.driver.actors.head import beside, within


def test_an_answer_is_handed_on_as_soon_as_it_is_there():
    assert within(3600, lambda: "here") == "here"  # as late as then, no test would end


def test_an_error_is_that_of_the_question():
    with pytest.raises(ValueError, match="no such actor"):
        within(10, lambda: int_of("no such actor"))


def int_of(words):
    raise ValueError(words)


def test_who_asks_a_head_that_is_away_goes_on_after_the_limit_and_may_look_later():
    back = threading.Event()
    assert within(0.05, back.wait) is None
    answer = beside(back.wait)
    assert not answer.done()
    back.set()
    assert answer.result(120) is True
