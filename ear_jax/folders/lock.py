"""One run at a time in a folder.

The kernel's file lock decides (`filelock`): it ends with the process that holds it, however that dies. Where hosts
share a file system that does not share locks, a heartbeat decides: an owner on another host whose record still changes
is alive. The record lies beside the lock, in `run.owner`.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import filelock

from ear_jax.errors import ConfigError, StorageError

BEAT_S = 5.0
SILENCE_S = 20.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """An exclusive claim on a folder, with a record of its owner."""

    def __init__(self, path: Path, *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> None:
        """Name the lock file; nothing is touched yet."""
        self.path, self.owner_path = path, path.with_suffix(".owner")
        self._beat_s, self._silence_s = beat_s, silence_s
        # A soft lock outlives a process that is killed on another host, so a file system without locks gets none.
        self._lock = filelock.UnixFileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
        self._owner: dict[str, Any] = {}
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self, run_id: str) -> list[str]:
        """Take the lock and return lines for the user; raises ConfigError naming the owner, or StorageError.

        Returns at once, except after an unclean end on another host or without locks: then the heartbeat is watched for
        a while.
        """
        try:
            has_locks = self._acquire_lock()
            last = _read(self.owner_path)
            is_here = last.get("host") == socket.gethostname()
            if last and not (has_locks and is_here) and self._is_beating(last):
                raise self._refusal(last)
            self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id}
            self._write(0)
        except OSError as error:
            self._lock.release()
            raise StorageError(
                f"Cannot lock {self.path}: {error.strerror or error}. Use a writable workdir."
            ) from error
        except BaseException:
            self._lock.release()
            raise
        self._stop.clear()
        self._beating = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._beating.start()
        return (
            [f"the last run here ({_name(last)}) ended without letting go of the folder; taking over"] if last else []
        )

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        if self._beating is None:
            return
        self._stop.set()
        self._beating.join()
        self._beating = None
        try:
            self.owner_path.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def _acquire_lock(self) -> bool:
        """Take the kernel's lock and return True; False where the file system has none."""
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise self._refusal(_read(self.owner_path)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _is_beating(self, owner: dict[str, Any]) -> bool:
        # The clocks of two hosts need not agree, so the record is watched for a change instead of being dated.
        deadline = time.monotonic() + self._silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s))
            if _read(self.owner_path) != owner:
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
            # A full disk is the business of what needs the space; the kernel's lock still holds.
            with contextlib.suppress(OSError):
                self._write(count)

    def _write(self, beat: int) -> None:
        # In one piece, but not synced: a beat that is lost with the machine is no loss.
        fresh = self.owner_path.with_suffix(f".owner.{os.getpid()}")
        fresh.write_text(json.dumps({**self._owner, "beat": beat}))
        fresh.replace(self.owner_path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "its owner left no name"
    return f"host {owner.get('host')}, process {owner.get('pid')}, run {owner.get('run_id')}"
