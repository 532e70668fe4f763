"""Being asked to stop outside a training loop."""

import os
import signal

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


def test_a_loop_inside_keeps_its_own_answer():
    with restartable(), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1), "remembered until the step is done, not raised"
