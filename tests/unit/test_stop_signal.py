"""Being asked to stop outside a training loop."""

import os
import signal
import sys
import time

import pytest

from ear_jax.distributed.stop_signal import StopSignal, restartable
from ear_jax.errors import PreemptedError


def test_a_termination_outside_a_loop_is_a_restartable_end():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match="SIGTERM: stopped; finished stages and batches are kept") as caught:
        with restartable():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal must end the work at once")
    assert caught.value.exit_status == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_a_finaliser_swallows_is_not_lost():
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # where the handler of the signal runs

    hook = sys.unraisablehook
    with pytest.raises(PreemptedError), restartable():
        dying = [Dying()]
        dying.clear()
        time.sleep(10)
        pytest.fail("the signal must end the work")
    assert sys.unraisablehook is hook


def test_what_else_a_finaliser_raises_is_reported_as_ever(monkeypatch):
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("faulty")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(str(dropped.exc_value)))
    with restartable():
        faulty = [Faulty()]
        faulty.clear()
    assert reported == ["faulty"]


def test_a_loop_inside_keeps_its_own_answer():
    with restartable(), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1), "remembered until the step is done, not raised"
