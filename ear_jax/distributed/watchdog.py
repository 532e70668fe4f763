"""Ends a process whose main thread is stuck: heartbeats of the job go on while it hangs, so nobody else can tell."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

EXIT_STATUS = 77
LEAST_S = 60.0
STEPS_FACTOR = 10.0
GRACE_S = 5.0
_STDERR = 2


class Watchdog:
    """Prints every thread's stack and ends the process when the loop has not beaten for too long.

    Too long is the larger of `least_s` and ten times the median interval between beats. Work that is known to take
    longer (compiling, saving, evaluating) goes into a `section` with a limit of its own. Idle until the first beat.

    The exit status is 77, after a line that names what was being done. Where that line cannot be printed, because
    native code hangs with Python's lock in its hand, `faulthandler` prints the stacks `GRACE_S` later and exits with 1.
    """

    def __init__(self, *, least_s: float = LEAST_S, leave: Callable[[int], None] = os._exit) -> None:
        """Start the watching thread; `leave` ends the process."""
        self._least_s, self._leave = least_s, leave
        self._intervals: deque[float] = deque(maxlen=101)
        self._last_beat: float | None = None
        self._armed: tuple[float, str] | None = None
        self._native_deadline = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str = "a training step") -> None:
        """Say that the loop is alive and about to do `doing`."""
        now = time.monotonic()
        if self._last_beat is not None:
            self._intervals.append(now - self._last_beat)
        self._last_beat = now
        usual = statistics.median(self._intervals) if self._intervals else 0.0
        self._arm((now + max(self._least_s, STEPS_FACTOR * usual), doing))

    @contextlib.contextmanager
    def section(self, doing: str, limit_s: float) -> Iterator[None]:
        """Give the block `limit_s` seconds; its time does not count as an interval between beats."""
        before, started = self._armed, time.monotonic()
        self._arm((started + limit_s, doing))
        try:
            yield
        finally:
            spent = time.monotonic() - started
            if self._last_beat is not None:
                self._last_beat += spent
            self._arm(None if before is None else (before[0] + spent, before[1]))

    def close(self) -> None:
        """Stop watching."""
        self._arm(None)
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _arm(self, armed: tuple[float, str] | None) -> None:
        self._armed = armed
        if armed is None:
            faulthandler.cancel_dump_traceback_later()
            self._native_deadline = 0.0
        # Arming starts a thread, too dear for every short step: within the grace, the earlier deadline still serves.
        elif not 0 <= armed[0] + GRACE_S - self._native_deadline < GRACE_S / 2:
            self._native_deadline = armed[0] + GRACE_S
            left = max(self._native_deadline - time.monotonic(), GRACE_S)
            faulthandler.dump_traceback_later(left, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least_s / 4)):
            armed = self._armed
            if armed is None or time.monotonic() < armed[0]:
                continue
            print(f"FATAL: stuck in {armed[1]}; the stacks of all threads follow", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            self._leave(EXIT_STATUS)
            return
