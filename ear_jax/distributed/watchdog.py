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


class Watchdog:
    """Prints every thread's stack and exits 77 when the loop has not beaten for too long.

    Too long is the larger of `least_s` and ten times the median interval between beats. Work that is known to take
    longer (compiling, saving, evaluating) goes into a `section` with a limit of its own. Idle until the first beat.
    """

    def __init__(self, *, least_s: float = LEAST_S, leave: Callable[[int], None] = os._exit) -> None:
        """Start the watching thread; `leave` ends the process."""
        self._least_s = least_s
        self._leave = leave
        self._intervals: deque[float] = deque(maxlen=101)
        self._last_beat: float | None = None
        self._deadline: float | None = None
        self._doing = ""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str = "a training step") -> None:
        """Say that the loop is alive and about to do `doing`."""
        now = time.monotonic()
        with self._changed:
            if self._last_beat is not None:
                self._intervals.append(now - self._last_beat)
            self._last_beat = now
            usual = statistics.median(self._intervals) if self._intervals else 0.0
            self._arm(now + max(self._least_s, STEPS_FACTOR * usual), doing)

    @contextlib.contextmanager
    def section(self, doing: str, limit_s: float) -> Iterator[None]:
        """Give the block `limit_s` seconds; its time does not count as an interval between beats."""
        with self._changed:
            before = (self._deadline, self._doing)
            started = time.monotonic()
            self._arm(started + limit_s, doing)
        try:
            yield
        finally:
            with self._changed:
                spent = time.monotonic() - started
                if self._last_beat is not None:
                    self._last_beat += spent
                deadline, doing_before = before
                self._arm(None if deadline is None else deadline + spent, doing_before)

    def close(self) -> None:
        """Stop watching."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _arm(self, deadline: float | None, doing: str) -> None:
        self._deadline, self._doing = deadline, doing
        self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return
            doing = self._doing
        print(f"FATAL: stuck in {doing}; the stacks of all threads follow", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        self._leave(EXIT_STATUS)
