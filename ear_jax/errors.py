"""Errors a user can cause or meet, each with the exit status a launcher can act on.

A message says what was wrong (with the value), what was expected, and what to do. `main.py` prints it without a
traceback and exits with the status. Programming faults are ordinary exceptions and keep their traceback.
"""

from typing import ClassVar


class EarError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_status: ClassVar[int] = 70


class ConfigError(EarError):
    """The configuration or the command line is wrong; carries every fault found, one a line."""

    exit_status = 64


class DataError(EarError):
    """The data cannot be used: missing, empty, or damaged beyond the configured fraction."""

    exit_status = 65


class StorageError(EarError):
    """A folder cannot be read or written, or the disk is full."""

    exit_status = 74


class PreemptedError(EarError):
    """The run was asked to stop, has saved its state, and can be started again."""

    exit_status = 75


class NonFiniteError(EarError):
    """Too many updates in a row had a non-finite loss or gradient; the last good checkpoint is intact."""

    exit_status = 76


class CheckError(EarError):
    """A sanity check found something that does not hold: an impossible figure, or a part that does nothing."""

    exit_status = 79
