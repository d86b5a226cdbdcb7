"""What a start is at is said where it takes longer than a moment, and only there."""

import io
import time

from ray_ep.observe.phases import Phases


def test_a_phase_that_takes_longer_than_a_moment_is_said_others_are_not():
    out = io.StringIO()
    with Phases("[mark] ", out, after_s=600) as quick:
        quick("quick")
    with Phases("[mark] ", out, after_s=0.05) as phase:
        phase("reading the data")
        limit = time.monotonic() + 60
        while not out.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
    assert out.getvalue() == "[mark] ray-ep: reading the data ...\n"
