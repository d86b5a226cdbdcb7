"""What is taken and what is refused, with the exact cause."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_ep.rank.generate.requests import Limits
from ray_ep.serve.http.admission import Places, Refused, new_tokens

LIMITS = Limits(vocabulary=100, context=10, cache_tokens=100, requests=4)


@pytest.mark.parametrize(
    ("prompt", "wanted", "says", "param"),
    [
        ([], 1, "prompt has no token", "prompt"),
        ([5, 100], 1, "token 100 is not of this model: allowed are 0 to 99", "prompt"),
        ([-1], 1, "token -1 is not of this model", "prompt"),
        ([1] * 10, None, "prompt has 10 tokens: this server takes 10 of .* so at most 9", "prompt"),
        ([1] * 7, 4, "max_tokens=4: prompt has 7 tokens, .*: allowed are 1 to 3", "max_tokens"),
    ],
)  # fmt: skip
def test_a_request_that_ranks_could_not_compute_is_refused(prompt, wanted, says, param):
    with pytest.raises(Refused, match=says) as e:
        new_tokens(prompt, wanted, LIMITS, "prompt")
    assert (e.value.param, e.value.status) == (param, 400)


@given(st.lists(st.integers(-2, 102), max_size=12), st.none() | st.integers(1, 12))
def test_whatever_is_admitted_fits(prompt, wanted):
    try:
        new = new_tokens(prompt, wanted, LIMITS, "prompt")
    except Refused:
        bad = not prompt or min(prompt) < 0 or max(prompt) > 99 or len(prompt) + (wanted or 1) > 10
        assert bad
    else:
        assert new >= 1
        assert 1 <= len(prompt) + new <= LIMITS.context
        assert wanted in (None, new)


def test_a_request_that_never_has_room_is_told_so_and_one_that_has_none_now_when_to_ask_again():
    clock = iter([0.0, 4.0, 8.0, 8.0]).__next__
    places = Places(3, clock)
    with pytest.raises(Refused, match="places for 3") as never:
        places.take(4)
    assert (never.value.status, never.value.retry_after_s) == (400, 0)
    places.take(3)
    for _ in range(3):  # at 0, 4 and 8 s: one in 4 s
        places.give_back()
    places.take(3)
    with pytest.raises(Refused, match="3 answers are under way, at most 3 may be: ask again in 8 s") as later:
        places.take(2)
    assert (later.value.status, later.value.retry_after_s) == (429, 8)


class PlacesMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now, self.under_way = 0.0, 0
        self.places = Places(5, lambda: self.now)

    @rule(count=st.integers(1, 6), seconds=st.floats(0, 1000))
    def ask(self, count, seconds):
        self.now += seconds
        if self.under_way + count <= 5:
            self.places.take(count)
            self.under_way += count
            return
        with pytest.raises(Refused) as e:
            self.places.take(count)
        assert (e.value.retry_after_s > 0) == (e.value.status == 429)
        assert e.value.retry_after_s <= Places.LONGEST_S

    @precondition(lambda self: self.under_way)
    @rule()
    def end(self):
        self.places.give_back()
        self.under_way -= 1

    @invariant()
    def never_more_than_there_are(self):
        assert self.places.taken == self.under_way <= 5


TestPlaces = PlacesMachine.TestCase
TestPlaces.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
