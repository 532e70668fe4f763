"""Finished images to be scored: a folder of image files, or the .npz that evaluators exchange. All of one square size.

Nothing is resized, cropped or left out in silence here: that would change the score.
"""

import contextlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
from PIL import Image

from ear_jax.data.images import EXTENSIONS, DamagedImage, DecodeRules, check_header, decode, printable
from ear_jax.errors import DataError, StorageError
from ear_jax.files import digest_of

ARRAY = "arr_0"
_FAULTS = (zipfile.BadZipFile, EOFError, ValueError, zlib.error, NotImplementedError, RuntimeError)


GRID_NAME = "grid.png"
_LABELS = ("label_arr", "arr_1")
_LOSSY = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp"})
_NUMBERED = re.compile(r"\d+_(.+)")


@runtime_checkable
class ImageSet(Protocol):
    """Images of one square size, in a fixed order.

    Attributes:
        path: where they lie.
        count: how many there are.
        image_px: their side.
        labels: class ids int32 [count], or None where they are not known.
        digest: identifies the files.
        notes: what a reader of the score should know.
    """

    path: Path
    count: int
    image_px: int
    labels: np.ndarray | None
    digest: str
    notes: tuple[str, ...]

    def read(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield all images in order, uint8 [n,h,w,3]; raises DataError where one cannot be read."""
        ...


def open_image_set(
    path: str | os.PathLike[str], *, class_ids: Mapping[str, int] | None = None, rules: DecodeRules | None = None
) -> ImageSet:
    """Open a folder of images or an .npz with `arr_0`, and check that all images have one square size.

    Args:
        path: Folder (searched with its sub-folders) or file.
        class_ids: Class id by the name that stands in file names (`000012_circle.png`) or names the sub-folder. Where
            an image has none of these names, no labels are known.
        rules: How files are decoded.

    Raises:
        DataError: there is nothing there, no image, images of several sizes, or one that cannot be read.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        return _Folder(where, class_ids or {}, rules or DecodeRules())
    if where.is_file() and where.suffix == ".npz":
        return _Archive(where)
    raise DataError(
        f"{printable(where)} is neither a folder nor an .npz file. Expected a folder of images, or a file with arr_0 "
        "uint8 [n, height, width, 3]."
    )


class _Folder:
    def __init__(self, path: Path, class_ids: Mapping[str, int], rules: DecodeRules) -> None:
        self.path, self._rules = path, rules
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        self._files = [p for p in found if p.name != GRID_NAME and not p.name.startswith(".")]
        if not self._files:
            raise DataError(f"no images in {printable(path)}. Expected image files, PNG rather than JPEG.")
        self.count = len(self._files)
        notes = []
        if len(found) > len(self._files):
            notes.append(f"{len(found) - len(self._files)} files named {GRID_NAME} or hidden were left out.")
        if any(p.suffix.lower() in _LOSSY for p in self._files):
            notes.append("JPEG or WebP files among the images: their compression changes a Fréchet distance; use PNG.")
        self.notes = tuple(notes)
        self.image_px = self._common_side()
        ids = [class_ids.get(_class_of(p, path)) for p in self._files]
        self.labels = None if None in ids else np.asarray(ids, np.int32)
        self.digest = digest_of(*((str(p.relative_to(path)), p.stat().st_size) for p in self._files))

    def read(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, batch_size):
            files = self._files[start : start + batch_size]
            yield np.stack([np.asarray(_guarded(file, lambda f: decode(f.read(), self._rules))) for file in files])

    def _common_side(self) -> int:
        sizes = (_guarded(file, lambda stream: _size(stream, self._rules)) for file in self._files)
        first = next(sizes)
        for file, size in zip(self._files[1:], sizes, strict=True):
            if size != first:
                raise DataError(
                    f"images of several sizes in {printable(self.path)}: {printable(self._files[0].name)} is "
                    f"{first[0]} x {first[1]}, {printable(file.name)} is {size[0]} x {size[1]} pixels. Expected one "
                    "size: how images are resized changes the score, so resize them yourself, all alike."
                )
        return _square(self.path, *first)


class _Archive:
    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, ()
        with _opened(path) as file:
            self.count, height, width, _ = _shape(file, path)
        self.image_px = _square(path, width, height)
        with zipfile.ZipFile(path) as archive:
            self.digest = digest_of(
                *sorted((entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist())
            )
        with np.load(path, allow_pickle=False) as arrays:
            given = [arrays[name] for name in _LABELS if name in arrays.files]
        fitting = [a for a in given if a.shape == (self.count,) and np.issubdtype(a.dtype, np.integer)]
        self.labels = fitting[0].astype(np.int32) if fitting else None

    def read(self, batch_size: int) -> Iterator[np.ndarray]:
        with _opened(self.path) as file:
            shape = _shape(file, self.path)
            image_bytes = self.image_px**2 * 3
            for start in range(0, self.count, batch_size):
                count = min(batch_size, self.count - start)
                try:
                    data = file.read(count * image_bytes)
                except (*_FAULTS, OSError) as error:
                    raise _damaged(self.path, f"images {start} to {start + count - 1}: {error}") from error
                if len(data) != count * image_bytes:
                    raise _damaged(self.path, f"it ends after {start + len(data) // image_bytes} images")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipExtFile]:
    """Give the array in an .npz as a stream."""
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = cast(zipfile.ZipExtFile, stack.enter_context(archive.open(f"{ARRAY}.npy")))
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
            "with ear_jax.folders.pictures.save_npz or numpy.savez."
        )
    return shape


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} is no sound .npz ({what}). Expected the file as it was written; copy or make it again.")


def _square(path: Path, width: int, height: int) -> int:
    if width != height:
        raise DataError(
            f"the images of {printable(path)} are {width} x {height} pixels; expected squares. Crop them yourself, as "
            "the real images are cropped."
        )
    return height


def _guarded(file: Path, use: Any) -> Any:
    try:
        with open(file, "rb") as stream:
            return use(stream)
    except (OSError, DamagedImage) as error:
        raise DataError(
            f"{printable(file)} cannot be read: {error}. A score of the rest is one of another set: mend or remove it."
        ) from error


def _size(stream: BinaryIO, rules: DecodeRules) -> tuple[int, int]:
    check_header(stream, rules)  # pyright: ignore[reportArgumentType]
    stream.seek(0)
    with Image.open(stream) as image:
        return image.size


def _class_of(file: Path, root: Path) -> str:
    folder = file.relative_to(root).parent
    if folder.parts:
        return folder.parts[-1]
    matched = _NUMBERED.fullmatch(file.stem)
    return matched.group(1) if matched else file.stem
