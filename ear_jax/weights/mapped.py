"""Files of weights as memory maps: opened with a message, and their pages let go of when they have been read."""

import mmap as mmap_module
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path

from ear_jax.errors import DataError, StorageError


class Unreadable(ValueError):
    """What is wrong with a file of weights, in words for the user; `open_tensors` adds its path and advice."""


def map_file(path: Path) -> mmap:
    """Return a file's bytes, mapped read-only.

    Raises:
        Unreadable: it is empty.
        DataError: there is no such file.
        StorageError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Unreadable("it is empty")
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path} is not a file of weights ({error.strerror}); give the path of the file.") from error
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error


def forget_pages(file: mmap) -> None:
    """Let the system drop what was read of a mapped file from this process's memory; the next look reads it again."""
    if hasattr(file, "madvise") and hasattr(mmap_module, "MADV_DONTNEED"):
        file.madvise(mmap_module.MADV_DONTNEED)
