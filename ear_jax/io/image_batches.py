"""The .npz of images that evaluators exchange (`arr_0` uint8 [N,h,w,3]), read in batches: memory is one batch."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import UInt8

from ear_jax.errors import DataError, StorageError

ARRAY = "arr_0"
_FAULTS = (zipfile.BadZipFile, EOFError, ValueError, zlib.error, NotImplementedError, RuntimeError)


class ImageBatches:
    """Images of an ADM-style .npz, in order; iterating again reads the file again.

    Attributes:
        count: Number of images.
        image_px: Height and width.
    """

    def __init__(self, path: str | os.PathLike[str], batch_size: int = 64):
        """Open a file and read what it says of its array.

        Raises:
            DataError: No such file, no .npz, no `arr_0`, or that is not uint8 [N,h,w,3] with N > 0.
            StorageError: The file cannot be read.
        """
        self._path, self._batch_size = Path(path), batch_size
        with _opened(self._path) as file:
            shape = _shape(file, self._path)
        self.count, self.image_px = shape[0], (shape[1], shape[2])

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "B h w 3"]]:
        """Yield batches; raises DataError where the file ends early or is damaged."""
        with _opened(self._path) as file:
            shape = _shape(file, self._path)
            image_bytes = shape[1] * shape[2] * shape[3]
            for start in range(0, self.count, self._batch_size):
                count = min(self._batch_size, self.count - start)
                try:
                    data = file.read(count * image_bytes)
                except (*_FAULTS, OSError) as error:
                    raise _damaged(self._path, f"images {start} to {start + count - 1}: {error}") from error
                if len(data) != count * image_bytes:
                    raise _damaged(self._path, f"it ends after {start + len(data) // image_bytes} images")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipExtFile]:
    """Give the array in an .npz as a stream."""
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = cast(zipfile.ZipExtFile, stack.enter_context(archive.open(f"{ARRAY}.npy")))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DataError(f"{path} is not a file ({error.strerror}). Give the .npz of the images.") from error
        except KeyError:
            names = ", ".join(archive.namelist()[:8]) or "nothing"
            raise DataError(f"{path} holds no images: expected uint8 {ARRAY} [N,h,w,3], found {names}.") from None
        except _FAULTS as error:
            raise _damaged(path, str(error)) from error
        except OSError as error:
            raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
        yield file


def _shape(file: zipfile.ZipExtFile, path: Path) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except _FAULTS as error:
        raise _damaged(path, str(error)) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran or 0 in shape:
        order = ", Fortran order" if is_fortran else ""
        raise DataError(
            f"{path}: {ARRAY} is {dtype} {shape}{order}. Expected uint8 [N,h,w,3] with at least one image; write it "
            "with ear_jax.io.pictures.save_npz or numpy.savez."
        )
    return shape


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is no sound .npz ({what}). Expected the file as it was written; copy or make it again.")
