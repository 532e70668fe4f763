"""Being asked to stop: SIGTERM or Ctrl-C becomes a question the training loop asks once a step."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from ear_jax.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

RETRY_S = 0.1


@contextlib.contextmanager
def restartable() -> Iterator[None]:
    """Turn a SIGTERM outside a training loop into PreemptedError: what is done so far stands, a restart goes on.

    For work whose files appear whole or can be continued. Only in one process; several have JAX's own handler.
    Python drops an exception that is raised while it runs a finaliser; the signal is sent again then.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise PreemptedError(
            f"{signal.Signals(number).name}: stopped; finished stages and batches are kept. "
            "Start the same command again to go on."
        )

    sent_again: list[threading.Timer] = []
    previous_hook = sys.unraisablehook

    def retry(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, PreemptedError):
            sent_again.append(threading.Timer(RETRY_S, os.kill, (os.getpid(), signal.SIGTERM)))
            sent_again[-1].start()
        else:
            previous_hook(dropped)

    previous = signal.signal(signal.SIGTERM, stop)
    sys.unraisablehook = retry
    try:
        yield
    finally:
        for timer in sent_again:
            timer.cancel()
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, previous)


class StopSignal(contextlib.AbstractContextManager):
    """Remembers a request to stop until the loop reaches a step boundary.

    In one process the first SIGTERM or SIGINT is remembered and a second one ends the process at once (a checkpoint
    being written is abandoned whole; the previous one stays). In several processes JAX's own SIGTERM handler must stay
    in place, because it is what makes all of them agree on one step, so nothing is installed here.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._received: int | None = None
        self._previous: dict[int, object] = {}
        if not self._several and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)

    def requested(self, step: int) -> bool:
        """Say whether to save and stop now; call exactly once after every step, with the same step on all processes."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    @property
    def name(self) -> str:
        """Name of the signal received, for the message."""
        return signal.Signals(self._received).name if self._received is not None else "SIGTERM"

    def close(self) -> None:
        """Put the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nsecond signal: exiting now\n")
            os._exit(128 + number)
        self._received = number
        text = f"\n{signal.Signals(number).name}: saving after this step; send it again to exit at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
