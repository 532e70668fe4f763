"""Whole-file writes: a reader sees the old file or the new one, never half of either."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ear_jax.errors import StorageError
from ear_jax.storage import as_storage_error


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
        value = json.loads(Path(path).read_bytes())
    except ValueError:
        return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise as_storage_error(error, f"reading {path}") or error from error
    return value if isinstance(value, dict) else None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return where downloads are kept: `$EAR_JAX_CACHE`, or `~/.cache/ear_jax` without it."""
    return Path(os.environ.get("EAR_JAX_CACHE") or Path.home() / ".cache" / "ear_jax")
