from __future__ import annotations

import os
import signal
import time

import pytest

from simpletuner.errors import Stopped
from simpletuner.training.signals import StopRequest
from tests.builders.run import command, write_run


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


def test_what_a_library_makes_of_a_stop_is_still_a_stop():
    with StopRequest().listening() as stop, pytest.raises(Stopped) as stopped, stop.settling():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Stopped as error:
            raise RuntimeError("Failed to import some module") from error

    assert stopped.value.exit_code == 130


def test_an_error_without_a_signal_stays_what_it_is():
    with StopRequest().listening() as stop, pytest.raises(RuntimeError), stop.settling():
        raise RuntimeError("a fault")


@pytest.mark.parametrize("seconds", [0.4, 0.9, 1.6, 2.4, 3.3, 4.3])
def test_a_signal_at_any_moment_of_the_start_is_a_stop_and_no_fault(tmp_path, seconds):
    write_run(tmp_path, max_train_steps=2000, validation_prompt="a cat", validation_resolution="32", validation_num_inference_steps=50)
    process = command(tmp_path)
    time.sleep(seconds)

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "unexpected" not in output and "stopped" in output
