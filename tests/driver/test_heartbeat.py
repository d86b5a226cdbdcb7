"""Who is lost, given what was heard and a clock: no Ray, no waiting."""

from hypothesis import given
from hypothesis import strategies as st

from ray_ep.driver.actors.heartbeat import HANGS, LOOK_S, PERIOD_S, Pulse

SILENCE_S, START_S = 5.0, 60.0


class Line:
    """A pulse and its clock; `answers` says of each second which ranks answer what they are asked."""

    def __init__(self, ranks=3, up=True):
        self.pulse, self.now, self.lost = Pulse(ranks, SILENCE_S, START_S, 0.0), 0.0, {}
        if up:
            self.pass_(LOOK_S, answering=range(ranks))

    def pass_(self, seconds, answering, up=True):
        """Look every LOOK_S until so many seconds are over, or somebody is lost."""
        for _ in range(round(seconds / LOOK_S)):
            self.now += LOOK_S
            self.pulse.look(self.now)
            for rank in self.pulse.due(self.now):
                self.pulse.asked(rank, self.now)
                if rank in answering:
                    self.pulse.answered(rank, self.now, up)
            if lost := self.pulse.lost(self.now):
                self.lost = lost
                return self
        return self


def test_who_answers_is_never_lost():
    assert Line().pass_(1000, answering=(0, 1, 2)).lost == {}


def test_a_rank_is_lost_once_it_was_silent_for_silence_s_and_no_sooner_and_it_alone():
    line = Line()
    line.pass_(20, answering=(0, 1, 2)).pass_(SILENCE_S - PERIOD_S - LOOK_S, answering=(0, 2))
    assert line.lost == {}
    assert line.pulse.late(line.now) == {1}  # nobody waits for what it says
    line.pass_(2 * PERIOD_S, answering=(0, 2))
    assert list(line.lost) == [1]
    assert line.lost[1] == "has not answered for 5.2 s (cluster.silence_s=5)"  # seen at the next look


def test_a_rank_that_holds_the_gil_for_a_while_is_not_lost():
    assert Line().pass_(3, answering=(0, 1, 2)).pass_(3.4, answering=(0, 2)).pass_(3, answering=(0, 1, 2)).lost == {}


def test_a_rank_that_holds_the_gil_for_long_is_not_lost_while_its_process_answers():
    line = Line().pass_(3, answering=(0, 1, 2)).pass_(HANGS * SILENCE_S - 2, answering=(0, 1, 2), up=False)
    assert line.pass_(20, answering=(0, 1, 2)).lost == {}


def test_a_rank_whose_python_hangs_for_good_is_lost_though_its_process_answers():
    line = Line(ranks=1).pass_(3, answering=(0,)).pass_(HANGS * SILENCE_S + 2, answering=(0,), up=False)
    assert line.lost == {0: "has not answered for 60 s, though its process does"}


def test_ranks_that_fall_silent_together_are_lost_together():
    assert list(Line().pass_(9, answering=(0,)).lost) == [1, 2]


def test_while_nobody_looks_nobody_is_lost_and_silence_is_counted_anew():
    line = Line()
    line.now += 1000  # the driver wrote a page, or was stopped itself
    assert line.pass_(SILENCE_S - 2 * LOOK_S, answering=()).lost == {}
    assert list(line.pass_(1, answering=()).lost) == [0, 1, 2]


def test_a_rank_that_starts_has_its_own_limit_and_is_told_as_such():
    line = Line(ranks=2, up=False)
    assert line.pass_(START_S - 1, answering=()).lost == {}  # no process yet: nobody is there to be silent
    assert line.pass_(2, answering=()).lost[0].startswith("has not started within 60 s (where that is too short: clus")


def test_a_process_that_answers_while_its_actor_imports_is_not_lost_before_the_limit():
    assert Line(ranks=1, up=False).pass_(START_S - 1, answering=(0,), up=False).lost == {}


def test_a_process_that_stops_while_its_actor_imports_is_lost_as_any_other():
    line = Line(ranks=2, up=False).pass_(3, answering=(0, 1), up=False).pass_(SILENCE_S + 1, (0,), up=False)
    assert list(line.lost) == [1]
    assert "has not answered" in line.lost[1]
    assert line.now < 10


@given(st.lists(st.tuples(st.floats(0.01, 4.0), st.integers(0, 7)), max_size=40))
def test_whoever_looks_and_hears_as_it_likes_only_silence_of_silence_s_loses_a_rank(moments):
    pulse, now = Pulse(3, SILENCE_S, START_S, 0.0), 0.0
    heard = [None] * 3
    for gap, answering in moments:
        now += gap
        pulse.look(now)
        for rank in range(3):
            if answering >> rank & 1:
                pulse.answered(rank, now, up=True)
                heard[rank] = now
        lost = pulse.lost(now)
        for rank in range(3):
            if rank in lost and heard[rank] is not None:
                assert now - heard[rank] >= SILENCE_S
            if heard[rank] is None:
                assert rank not in lost or now >= START_S


def test_a_driver_that_was_busy_for_longer_than_a_look_takes_counts_it_against_nobody():
    pulse = Pulse(1, silence_s=2.0, start_s=60.0, now=0.0)
    pulse.answered(0, 0.5, up=True)
    pulse.look(0.6)
    pulse.look(2.6)  # it planned meanwhile
    assert pulse.lost(2.6) == {}
    pulse.look(4.0)
    pulse.look(4.2)
    assert pulse.lost(4.2) == {}
    for tenths in range(44, 64, 2):
        pulse.look(tenths / 10)
    assert set(pulse.lost(6.2)) == {0}
