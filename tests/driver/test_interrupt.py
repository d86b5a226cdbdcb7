"""Signals: the first is answered at once by whoever waits, the second stops at once."""

import os
import signal

import pytest

from ray_ep.driver.interrupt import Interrupt


@pytest.fixture
def told():
    """An interrupt that holds, and what it told."""
    with Interrupt().caught() as interrupt:
        interrupt.hold()
        said = []
        interrupt.tell = said.append
        yield interrupt, said


def send(number):
    os.kill(os.getpid(), number)


def test_a_signal_is_told_once_by_the_next_look(told):
    interrupt, said = told
    assert not interrupt()
    send(signal.SIGTERM)
    assert said == []  # the handler itself does nothing, for it may come in the middle of printing
    assert interrupt()
    assert interrupt()
    assert said == ["SIGTERM"]


def test_a_second_signal_stops_at_once(told):
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_before_anything_is_started_the_first_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupt().caught():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_start_is_left_at_the_next_look():
    with Interrupt().caught() as interrupt:
        interrupt.hold()
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
