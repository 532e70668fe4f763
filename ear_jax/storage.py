"""Telling a storage fault (full, read-only, forbidden) from other errors, and checking before writing."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ear_jax.errors import StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
BROKEN = {errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENXIO}

# Array storage reports system errors as text inside a ValueError.
_TEXTS = (
    (re.compile(r"No space left|Disk quota exceeded|File too large", re.I), "the disk is full"),
    (re.compile(r"Read-only file system|Permission denied|Operation not permitted", re.I), "it cannot be written"),
    (re.compile(r"Input/output error|Stale file handle", re.I), "the storage does not answer"),
)


def as_storage_error(error: BaseException, doing: str) -> StorageError | None:
    """Return a StorageError that explains `error`, or None when storage is not the cause."""
    if isinstance(error, StorageError):
        return error
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number in FULL:
            return _explain(doing, "the disk is full", os.strerror(number))
        if number in FORBIDDEN:
            return _explain(doing, "access is denied", os.strerror(number))
        if number in BROKEN:
            return _explain(doing, "the storage does not answer", os.strerror(number))
        for pattern, meaning in _TEXTS:
            found = pattern.search(str(cause))
            if found:
                return _explain(doing, meaning, found.group(0))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory (host or device), not storage, ran out."""
    if as_storage_error(error, "") is not None:
        return False
    return any(isinstance(cause, MemoryError) or _is_device_memory(cause) for cause in _chain(error))


def _is_device_memory(error: BaseException) -> bool:
    return type(error).__name__ in {"JaxRuntimeError", "XlaRuntimeError"} and "RESOURCE_EXHAUSTED" in str(error)


def check_free_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise StorageError when `directory`'s disk has less than `needed_bytes` free."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise _explain(f"looking at {directory}", "it cannot be read", error.strerror or str(error)) from error
    if free < needed_bytes:
        raise StorageError(
            f"The disk of {directory} is too full: the {what} needs {readable_bytes(needed_bytes)}, there are "
            f"{readable_bytes(free)} free. Free some space or use another workdir; earlier checkpoints are intact."
        )


def readable_bytes(count: int) -> str:
    """Return a byte count in the largest unit that leaves a number above one."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _explain(doing: str, meaning: str, detail: str) -> StorageError:
    return StorageError(
        f"{doing[:1].upper()}{doing[1:]}: {meaning} ({detail}). Expected a writable folder with free space; "
        "free some space, correct the permissions or use another workdir. Earlier checkpoints are intact."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
