from __future__ import annotations

import os
import signal

import pytest

from simpletuner.errors import Stopped
from simpletuner.training.signals import StopRequest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_during_training_a_signal_is_noted_with_its_exit_code(number, code):
    with StopRequest().listening() as stop, stop.deferred():
        os.kill(os.getpid(), number)

        assert stop.is_made and stop.exit_code == code


def test_before_training_a_signal_stops_at_once():
    with StopRequest().listening(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)

    assert stopped.value.exit_code == 143


def test_a_second_signal_does_not_wait():
    with StopRequest().listening() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGINT) != before

    assert signal.getsignal(signal.SIGINT) == before
