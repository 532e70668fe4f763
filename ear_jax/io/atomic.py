"""Whole-file writes: a reader sees the old file or the new one, never half of either."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ear_jax.errors import StorageError


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
