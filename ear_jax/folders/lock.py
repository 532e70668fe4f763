"""One run at a time in a folder.

The kernel's file lock decides: it ends with the process that holds it, however that dies. Where hosts share a file
system that does not share locks, a heartbeat decides: an owner on another host whose record still changes is alive.
"""

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ear_jax.errors import ConfigError, StorageError

BEAT_S = 5.0
SILENCE_S = 20.0


class RunLock:
    """An exclusive claim on a folder, held by a file that names its owner."""

    def __init__(self, path: Path, *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        """Name the lock file; nothing is touched yet."""
        self.path = path
        self._beat_s = beat_s
        self._silence_s = silence_s
        self._file: int | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self, run_id: str) -> list[str]:
        """Take the lock and return lines for the user; raises ConfigError naming the owner, or StorageError.

        Returns at once, except after an unclean end on another host: then the heartbeat is watched for a while.
        """
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"Cannot open the lock {self.path}: {error.strerror}. Use a writable workdir."
            ) from error
        try:
            notes = self._take(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id}
        self._stop.clear()
        self._write(0)
        self._beating = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._beating.start()
        return notes

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        if self._file is None:
            return
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        try:
            os.ftruncate(self._file, 0)
        finally:
            os.close(self._file)
            self._file = None

    def _take(self, file: int) -> list[str]:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(_read(self.path)) from None
        except OSError:
            # The file system has no locks: the heartbeat alone must do.
            pass
        owner = _read(self.path)
        if not owner:
            return []
        if owner.get("host") != socket.gethostname() and self._is_beating(owner):
            raise self._refusal(owner)
        return [f"the last run here ({_name(owner)}) ended without letting go of the folder; taking over"]

    def _is_beating(self, owner: dict[str, Any]) -> bool:
        # The clocks of two hosts need not agree, so the record is watched for a change instead of being dated.
        deadline = time.monotonic() + self._silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s))
            if _read(self.path) != owner:
                return True
        return False

    def _refusal(self, owner: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self.path.parent} is in use by another run ({_name(owner)}). Wait for it to end, stop it, or choose "
            "another --workdir."
        )

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._beat_s):
            count += 1
            try:
                self._write(count)
            except OSError:
                # A full disk is the business of what needs the space; the kernel's lock still holds.
                continue

    def _write(self, beat: int) -> None:
        assert self._file is not None
        text = json.dumps({**self._owner, "beat": beat}).encode()
        os.pwrite(self._file, text.ljust(256) + b"\n", 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "its owner left no name"
    return f"host {owner.get('host')}, process {owner.get('pid')}, run {owner.get('run_id')}"
