"""The state machine of a run: its table, what it refuses and what it logs."""

import logging

import pytest

from ray_ep.driver.states import TRANSITIONS, IllegalTransition, State, States


def test_every_state_can_be_reached_and_every_one_but_the_last_can_end():
    reached = {State.FORMING}.union(*TRANSITIONS.values())
    assert reached == set(State) == set(TRANSITIONS)
    assert [s for s in State if State.STOPPED not in TRANSITIONS[s]] == [State.STOPPED]


@pytest.mark.parametrize(("first", "then"), [(State.FORMING, State.MIGRATING), (State.STOPPED, State.STEPPING)])
def test_a_move_that_the_table_does_not_have_raises_and_changes_nothing(first, then):
    states = States()
    states.now = first
    with pytest.raises(IllegalTransition, match=rf"from {first.value} to {then.value} \(why\): allowed are"):
        states.to(then, "why")
    assert states.now is first


def test_each_transition_is_one_line_of_the_log(caplog):
    states = States()
    with caplog.at_level(logging.INFO, "ray_ep.driver"):
        states.to(State.STEPPING, "two ranks")
        with states.during(State.MIGRATING, "version 1"):
            assert states.now is State.MIGRATING
    assert caplog.messages == [
        "state from=forming to=stepping why='two ranks'",
        "state from=stepping to=migrating why='version 1'",
        "state from=migrating to=stepping why='two ranks'",
    ]


def test_an_error_in_a_state_leaves_it_there_for_whoever_recovers():
    states = States()
    states.to(State.STEPPING, "")
    with pytest.raises(ValueError, match="lost"), states.during(State.MIGRATING, ""):
        raise ValueError("lost")
    states.to(State.RECOVERING, "lost")
