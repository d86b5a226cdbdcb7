"""The time of a step by phase, with a clock and layers set by hand."""

import pytest

from ray_ep.moe import PHASES
from ray_ep.rank.step.clock import STEP_PHASES, StepClock


def test_a_phase_has_the_time_until_the_next_and_layers_have_theirs_by_direction():
    now, layers = [0.0], dict.fromkeys(PHASES, 0.0)
    clock = StepClock(layers, lambda: now[0])

    def pass_by(seconds, **inside):
        now[0] += seconds
        for name, spent in inside.items():
            layers[name] += spent

    pass_by(5, exchange=1)  # an evaluation, say
    for phase, seconds, inside in [
        ("data", 1, {}),
        ("forward", 10, {"route": 1, "pack": 0.5, "exchange": 2, "experts": 3, "combine": 0.25}),
        ("backward", 20, {"exchange": 4, "experts": 6}),
        ("norm", 2, {}),
    ]:
        clock.enter(phase)
        pass_by(seconds, **inside)
    clock.enter("")
    pass_by(7)
    want = {"data": 1, "forward": 3.25, "dispatch_forward": 1.75, "exchange_forward": 2, "experts_forward": 3}
    want |= {"backward": 10, "exchange_backward": 4, "experts_backward": 6, "norm": 2}
    assert clock.seconds == pytest.approx({**dict.fromkeys(STEP_PHASES, 0), **want})
