"""Keeps the storage library's own account of errors off the terminal: each is raised as well, and said once by us.

A failed read or write otherwise prints hundreds of lines: nested tracebacks in the log, and, whenever the collector
comes by, one more page for every read that was under way beside the failed one.
"""

import inspect
import logging
import sys
import traceback
from pathlib import Path
from typing import Any


def quiet_orbax() -> None:
    """Install both filters; calling again does nothing. Whatever is not orbax's passes unchanged."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, _LogFilter) for existing in logger.filters):
            logger.addFilter(_LogFilter())
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


class _LogFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        files = [record.pathname]
        if record.exc_info and record.exc_info[2] is not None:
            files += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        return record.levelno >= logging.CRITICAL or not any("orbax" in Path(file).parts for file in files)


class _UnraisableFilter:
    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def __call__(self, problem: Any) -> None:
        abandoned_read = (
            inspect.iscoroutine(problem.object) and "orbax" in Path(problem.object.cr_code.co_filename).parts
        )
        # A read that ends after its siblings failed reports to an event loop that is gone.
        late_answer = problem.object is None and str(problem.exc_value) == "Event loop is closed"
        if not (abandoned_read or late_answer):
            self._usual(problem)
