"""numpy's files, read without trust: .npz archives and .npy headers. Nothing is unpickled.

What a header claims is held against the bytes that are there before memory is taken for it.
"""

import contextlib
import errno
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np

from ear_jax.errors import DataError, StorageError

_LONGEST_HEADER = 10_000  # what numpy reads by itself
_SMALL_BYTES = 16 << 20
_MOST_TIMES = 16
_MOST_TIMES_BY_DEFLATE = 1040
"""Compressed arrays may be larger than their bytes by this; below `_SMALL_BYTES` by anything: labels compress well."""
_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, OverflowError),
    RuntimeError,  # encrypted, or of a method that is not known
)


class Header(NamedTuple):
    """What an array is, and where its elements begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    offset: int

    @property
    def stop(self) -> int:
        """Where its elements end."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """An open .npz. Its methods raise DataError for what is damaged or claims too much, StorageError for the disk."""

    def __init__(self, path: Path, file: io.BufferedIOBase, advice: str) -> None:
        self._path, self._advice = path, advice
        with self._told():
            self._archive = zipfile.ZipFile(file)
            listed = self._archive.infolist()
            self.entries = tuple((info.filename, info.CRC, info.file_size) for info in listed)
            """Name, CRC-32 and size of every file in it."""
            self._infos = {info.filename.removesuffix(".npy"): info for info in listed}
            if len(self._infos) != len(listed):
                raise ValueError("it holds a name twice")
            if sum(info.compress_size for info in listed) > os.fstat(file.fileno()).st_size:
                raise ValueError("its arrays claim more bytes than it has, or the same ones twice")
            for info in listed:
                self._archive.open(info).close()  # refuses one that is encrypted or of another name in its place
                times = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _MOST_TIMES_BY_DEFLATE}
                if info.file_size > times.get(info.compress_type, 0) * info.compress_size:
                    raise ValueError(
                        f"{info.filename[:80]!r} claims {info.file_size} bytes in {info.compress_size}, more than the "
                        "ways in which numpy writes can hold"
                    )
        self.names = tuple(self._infos)

    def read(self, name: str, *, most_bytes: int | None = None) -> np.ndarray:
        """Return an array, of at most so many bytes."""
        with self.stream(name) as (_, header):
            info, size = self._infos[name], header.stop - header.offset
            most = max(_SMALL_BYTES, _MOST_TIMES * info.compress_size) if info.compress_type else size
            most = most if most_bytes is None else min(most, most_bytes)
            if size > most:
                raise ValueError(
                    f"{name} would take {size} bytes, packed in {info.compress_size}; at most {most} are taken: if it "
                    "is sound, write it with numpy.savez, which does not compress"
                )
            with self._archive.open(info) as file:
                return np.lib.format.read_array(file, allow_pickle=False)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[tuple[io.BufferedIOBase, Header]]:
        """Give the elements of an array as a stream; faults of reading it are told too."""
        with self._told():
            info = self._infos.get(name)
            if info is None:
                raise ValueError(f"it holds no {name}")
        with self._told(), cast(zipfile.ZipExtFile, self._archive.open(info)) as file:
            try:
                header = read_header(file)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            held = info.file_size - header.offset
            if header.stop != info.file_size:
                raise ValueError(f"{name} should be {header.stop - header.offset} bytes and is {held}")
            yield file, header

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EINVAL:  # what seeking to a damaged offset gives
                raise StorageError(f"Cannot read {self._path}: {error.strerror or error}.") from error
            raise DataError(f"{self._path} is no sound .npz (a damaged offset). {self._advice}") from error
        except _FAULTS as error:
            raise DataError(f"{self._path} is no sound .npz ({error!s:.300}). {self._advice}") from error


@contextlib.contextmanager
def open_archive(path: str | os.PathLike[str], advice: str = "Copy or make it again.") -> Iterator[Archive]:
    """Open an .npz for as long as the block lasts; `advice` ends what is said of a damaged one.

    Raises:
        DataError: it is damaged or no .npz.
        StorageError: it cannot be read.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    with file:
        yield Archive(Path(path), file, advice)


def read_header(file: io.BufferedIOBase) -> Header:
    """Read what the .npy at the start of `file` is; ValueError for what is none, or has other elements than plain ones.

    Plain are numbers, truth and texts.
    """
    version = np.lib.format.read_magic(io.BytesIO(file.read(8)))
    size = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header claims {length} bytes, at most {_LONGEST_HEADER} are read")
    # Those of version 3 differ from 2 in the names of fields, which no plain array has.
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, is_fortran, dtype = parse(io.BytesIO(size + file.read(length)))
    except Exception as error:  # numpy hands on what Python's own parsers raise of a text that is made to be odd
        raise ValueError(f"its header is no description of an array ({type(error).__name__})") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read since reading runs code")
    is_counted = all(type(n) is int and n >= 0 for n in shape)
    if dtype.kind not in "biufcSU" or not is_counted or (not dtype.itemsize and math.prod(shape)):
        raise ValueError(f"its header claims {dtype!s:.80} {str(shape)[:80] if is_counted else 'of no size'}")
    if math.prod(n for n in shape if n) * max(dtype.itemsize, 1) >= 2**62:
        raise ValueError("its header claims an array of endless size")
    return Header(shape, dtype, is_fortran, 8 + len(size) + length)


def map_array(
    path: str | os.PathLike[str], shape: tuple[int, ...], dtype: str, mode: Literal["r", "r+"] = "r"
) -> np.memmap:
    """Return an .npy of just this shape and type, mapped; ValueError where it is another, OSError as of `open`."""
    with open(path, "rb") as file:
        header, held = read_header(file), os.fstat(file.fileno()).st_size
    if header.shape != shape or header.dtype != np.dtype(dtype) or header.is_fortran:
        raise ValueError(f"it holds {header.dtype} {list(header.shape)}, expected {dtype} {list(shape)}")
    if held != header.stop:
        raise ValueError(f"it has {held} bytes, expected {header.stop}")
    return np.memmap(path, dtype, mode, header.offset, shape)
