"""When ranks are asked for samples of recent tokens: soon, then seldom, and the more seldom the longer that takes."""

import numpy as np
import pytest

from ray_ep.driver.run.sampling import EVERY_S, FIRST_S, SHARE, Sampling
from tests.driver.scenes import Clock


@pytest.mark.parametrize(("takes_s", "wait_s"), [(0.001, EVERY_S), (0.5, SHARE * 0.5)])
def test_a_sample_is_due_soon_then_seldom_and_never_costs_more_than_a_thousandth(takes_s, wait_s):
    clock, asked = Clock(), []

    def ask():
        asked.append(clock.now)
        clock.now += takes_s
        return np.ones((1, 1, 1))

    sampling = Sampling(ask, clock)
    assert sampling.take() is None
    clock.now = FIRST_S - 0.01
    assert sampling.take() is None
    clock.now = FIRST_S
    assert sampling.take().shape == (1, 1, 1)
    clock.now = FIRST_S + takes_s + wait_s - 0.01
    assert sampling.take() is None
    clock.now += 0.02
    assert sampling.take() is not None
    assert len(asked) == 2
