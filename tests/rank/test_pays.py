"""The run's own steps decide whether balance inside the step pays."""

import pytest

from ray_ep.rank.pays import COMPARED_STEPS, LEAST, WARM_STEPS, Pays


def drive(pays, steps, seconds, imbalance):
    """Words that came while `seconds(on, number)` were fed."""
    return [w for n in range(steps) if (w := pays.step(seconds(pays.on, n), imbalance))]


@pytest.mark.parametrize(("with_it", "without", "on"), [(0.9, 1.0, True), (1.1, 1.0, False)])
def test_the_faster_of_the_two_stays_and_the_answer_gives_both_times(with_it, without, on):
    pays = Pays()
    (words,) = drive(pays, WARM_STEPS + 2 * COMPARED_STEPS + 10, lambda on, _: with_it if on else without, 1.4)
    assert pays.on is on
    assert words.startswith(f"balance inside the step is {'on' if on else 'off'}: a step takes {1000 * with_it:.0f} ms")
    assert f"{1000 * without:.0f} ms without" in words
    assert "1.40 of the mean" in words


def test_first_steps_and_a_drift_of_the_machine_decide_nothing():
    pays = Pays()
    slower_and_slower = lambda on, n: 100.0 if n < WARM_STEPS else (0.97 if on else 1.0) * (1 + 0.05 * n)  # noqa: E731
    drive(pays, WARM_STEPS + 2 * COMPARED_STEPS, slower_and_slower, 1.4)
    assert pays.on


def test_even_ranks_are_left_alone_at_once():
    pays = Pays()
    (words,) = drive(pays, WARM_STEPS + 1, lambda on, _: 1.0, 1.01)
    assert not pays.on
    assert "1.01" in words


def test_it_is_asked_again_only_when_the_imbalance_has_changed_and_not_too_often():
    pays = Pays()
    worse = lambda on, _: 1.1 if on else 1.0  # noqa: E731
    drive(pays, WARM_STEPS + 2 * COMPARED_STEPS, worse, 1.2)
    assert not pays.on
    assert not drive(pays, 10 * LEAST, worse, 1.25)
    assert not pays.on
    better = lambda on, _: 0.7 if on else 1.0  # noqa: E731
    assert not drive(pays, LEAST // 4, better, 1.6)
    assert not pays.on
    assert len(drive(pays, LEAST + 2 * COMPARED_STEPS, better, 1.6)) == 1
    assert pays.on
