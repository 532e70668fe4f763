"""The disk: whole-file writes, digests, and telling a storage fault (full, read-only, forbidden) from other errors.

A reader sees the old file or the new one, never half of either.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ear_jax.errors import StorageError

_NUMBERS = {
    "the disk is full": {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "access is denied": {errno.EROFS, errno.EACCES, errno.EPERM},
    "the storage does not answer": {errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENXIO},
}
# Array storage reports system errors as text inside a ValueError.
_TEXTS = (
    (re.compile(r"No space left|Disk quota exceeded|File too large", re.I), "the disk is full"),
    (re.compile(r"Read-only file system|Permission denied|Operation not permitted", re.I), "it cannot be written"),
    (re.compile(r"Input/output error|Stale file handle", re.I), "the storage does not answer"),
)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    Missing parent folders are made. The bytes are on disk before the name changes.

    Raises:
        StorageError: The folder cannot be written or the disk is full; nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError(
            f"Cannot write {target}: {error.strerror or error}. "
            "Expected a writable folder with free space; free some space or choose another workdir."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically; raises StorageError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def digest_of(*parts: Any) -> str:
    """Return 16 hex digits that identify the parts, which must have a stable repr or be bytes."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape"))
        state.update(b"\0")
    return state.hexdigest()


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write indented JSON atomically: a reader sees the old file or the new one; raises StorageError."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None when there is no file or no object in it; StorageError if forbidden."""
    try:
        # As text: of bytes json guesses the encoding.
        value = json.loads(Path(path).read_text("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError, FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise as_storage_error(error, f"reading {path}") or error from error
    return value if isinstance(value, dict) else None


SEAL = "seal"
"""The key under which a JSON document keeps the digest of all its other keys."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with the SHA-256 of its content as the last key, whatever seal it had."""
    body = {name: value for name, value in document.items() if name != SEAL}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_sound(document: Mapping[str, Any]) -> bool | None:
    """Tell whether a document is what was sealed; None where it never was (release 0.1.0 sealed nothing)."""
    return document[SEAL] == sealed(document)[SEAL] if SEAL in document else None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return where downloads are kept: `$EAR_JAX_CACHE`, or `~/.cache/ear_jax` without it."""
    return Path(os.environ.get("EAR_JAX_CACHE") or Path.home() / ".cache" / "ear_jax")


def as_storage_error(error: BaseException, doing: str) -> StorageError | None:
    """Return a StorageError that explains `error`, or None when storage is not the cause."""
    if isinstance(error, StorageError):
        return error
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        for meaning, numbers in _NUMBERS.items():
            if number in numbers:
                return _explain(doing, meaning, os.strerror(number))
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
