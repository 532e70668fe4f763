"""Finished images to be scored: a folder of image files, or the .npz that evaluators exchange. All of one square size.

Nothing is resized, cropped or left out in silence here: that would change the score.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Never, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ear_jax.array_files import Archive, Header, open_archive
from ear_jax.data.images import DamagedImage, DecodeRules, check_header, decode, printable
from ear_jax.data.tree import Dropped, sub_folders, walk
from ear_jax.errors import DataError
from ear_jax.files import digest_of

ARRAY = "arr_0"
_ADVICE = "Expected the file as it was written; copy or make it again."
GRID_NAME = "grid.png"
_LABELS = ("label_arr", "arr_1", "labels", "label", "class_ids", "class_labels", "y", "targets", "target", "classes")
"""Names, in any case, of arrays that hold the class of each image; `classes` may also list names of classes."""
_LOSSY = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp"})
_NUMBERED = re.compile(r"\d+_(.+)")


@runtime_checkable
class ImageSet(Protocol):
    """Images of one square size, in a fixed order.

    Attributes:
        path: where they lie.
        count: how many there are.
        image_px: their side.
        labels: class ids int32 [count], -1 for an image without one; None where there are none.
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
        path: Folder (searched as a training folder is: with its sub-folders, without hidden ones) or file.
        class_ids: Class id by the name of a sub-folder, at any level, or in file names (`000012_circle.png`), or in an
            array of names. The order of folders plays no part.
        rules: How files are decoded.

    Raises:
        DataError: there is nothing there, no image, images of several sizes, or one that cannot be read.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        return _Folder(where, class_ids or {}, rules or DecodeRules())
    if where.is_file() and where.suffix == ".npz":
        return _Archive(where, class_ids or {}, rules or DecodeRules())
    raise DataError(
        f"{printable(where)} is neither a folder nor an .npz file. Expected a folder of images, or a file with arr_0 "
        "uint8 [n, height, width, 3]."
    )


class _Folder:
    def __init__(self, path: Path, class_ids: Mapping[str, int], rules: DecodeRules) -> None:
        self.path, self._rules = path, rules
        dropped, root = Dropped(), str(path)
        found = walk(root, root, dropped, is_deep=False)
        for folder in sub_folders(root, dropped):
            found += walk(folder, root, dropped)
        kept = []
        for name, size, _ in sorted(found, key=lambda item: item[0].split(os.sep)):
            if os.path.basename(name) == GRID_NAME:
                dropped.add("files that hold a grid of images", name)
            else:
                kept.append((name, size))
        self._files = [path / name for name, _ in kept]
        if not self._files:
            raise DataError(f"no images in {printable(path)}. Expected image files, PNG rather than JPEG.")
        self.count = len(self._files)
        notes = dropped.notes
        if any(p.suffix.lower() in _LOSSY for p in self._files):
            notes.append("JPEG or WebP files among the images: their compression changes a Fréchet distance; use PNG.")
        self.image_px = self._common_side()
        ids = [_class_of(name, class_ids) for name, _ in kept]
        unknown = [name for (name, _), label in zip(kept, ids, strict=True) if label < 0]
        self.labels = np.asarray(ids, np.int32) if len(unknown) < self.count else None
        if unknown and class_ids:
            notes.append(
                f"{len(unknown)} of {self.count} images have no class in their name or folder (such as "
                f"{printable(unknown[0])}): what needs classes is measured without them. "
                f"Known classes: {_shortened(class_ids)}."
            )
        self.notes = tuple(notes)
        self.digest = digest_of(*kept)

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
    def __init__(self, path: Path, class_ids: Mapping[str, int], rules: DecodeRules) -> None:
        self.path = path
        with open_archive(path, _ADVICE) as archive:
            if ARRAY not in archive.names:
                names = ", ".join(name for name, _, _ in archive.entries[:8]) or "nothing"
                raise DataError(f"{path} holds no images: expected uint8 {ARRAY} [N,h,w,3], found {names:.500}.")
            with archive.stream(ARRAY) as (_, header):
                self.count, height, width, _ = _checked(header, path)
            self.image_px = _square(path, width, height)
            if height * width > rules.max_pixels:
                raise DataError(f"{path}: images of {width} x {height} pixels; at most {rules.max_pixels} are read.")
            self.digest = digest_of(*sorted(archive.entries))
            self.labels, self.notes = _stored_labels(archive, path, self.count, class_ids)

    def read(self, batch_size: int) -> Iterator[np.ndarray]:
        image = (self.image_px, self.image_px, 3)
        with open_archive(self.path, _ADVICE) as archive, archive.stream(ARRAY) as (file, header):
            if header.shape != (self.count, *image):
                raise ValueError("it has changed since it was opened")
            for start in range(0, self.count, batch_size):
                count = min(batch_size, self.count - start)
                data = file.read(count * math.prod(image))
                if len(data) != count * math.prod(image):
                    raise ValueError(f"it ends within images {start} to {start + count - 1}")
                yield np.frombuffer(data, np.uint8).reshape(count, *image)


def _checked(header: Header, path: Path) -> tuple[int, ...]:
    shape, dtype, is_fortran, _ = header
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran or 0 in shape:
        order = ", Fortran order" if is_fortran else ""
        raise DataError(
            f"{path}: {ARRAY} is {dtype} {shape}{order}. Expected uint8 [N,h,w,3] with at least one image; write it "
            "with ear_jax.folders.pictures.save_npz or numpy.savez."
        )
    return shape


def _stored_labels(
    archive: Archive, path: Path, count: int, class_ids: Mapping[str, int]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return class ids int32 [count] of an archive, and what to tell; raises DataError for what could be misread."""
    found: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for name in sorted((n for n in archive.names if n.lower() in _LABELS), key=lambda n: _LABELS.index(n.lower())):
        labels, told = _labels_of(archive.read(name), name, path, count, class_ids)
        notes += told
        if labels is not None:
            found[name] = labels
    (first, taken), *others = found.items() or [("", None)]
    for name, labels in others:
        if differing := int((labels != taken).sum()):
            raise DataError(
                f"{printable(path)}: {printable(first)} and {printable(name)} both hold the class of each image and "
                f"differ for {differing} of {count}. Expected one, or the same ones; take out the wrong one."
            )
    if found and list(found) != ["label_arr"]:
        notes.append(f"the class of each image is read from {' and '.join(map(printable, found))}.")
    if unread := [name for name in archive.names if name != ARRAY and name.lower() not in _LABELS]:
        notes.append(f"not read: {_shortened(unread)}.")
    return taken, tuple(notes)


def _labels_of(
    given: np.ndarray, name: str, path: Path, count: int, class_ids: Mapping[str, int]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    what = f"is {given.dtype} {list(given.shape)}"
    if name.lower() == "classes" and given.dtype.kind in "US" and given.shape != (count,):
        return None, (f"{name} {what} lists names, not the class of each of {count} images: not read.",)
    if given.shape[:1] != (count,):
        _refuse_labels(path, name, f"{what}, for {count} images")
    if given.ndim == 2 and given.shape[1] > 1 and given.dtype.kind in "biuf":
        if not (np.isin(given, (0, 1)).all() and (given.sum(axis=1) == 1).all()):
            _refuse_labels(path, name, f"{what}, whose rows are not one-hot")
        return given.argmax(axis=1).astype(np.int32), (f"{name} is one-hot: read as {given.shape[1]} classes.",)
    if given.size != count:
        _refuse_labels(path, name, what)
    values = given.reshape(count)
    if values.dtype.kind in "US":
        texts = (np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values).tolist()
        if not class_ids:
            return None, (f"{name} holds class names, but no classes are known here: no labels.",)
        wrong = sorted({text for text in texts if text not in class_ids})
        if wrong:
            _refuse_labels(
                path, name, f"has names that are no class ({_shortened(wrong)}; known {_shortened(class_ids)})"
            )
        return np.asarray([class_ids[text] for text in texts], np.int32), ()
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all() or (values != np.floor(values)).any():
        _refuse_labels(path, name, f"{what}, not whole numbers")
    if values.min() < 0 or values.max() > np.iinfo(np.int32).max:
        _refuse_labels(path, name, f"holds {values.min()} to {values.max()}, which are no class ids")
    return values.astype(np.int32), ()


def _refuse_labels(path: Path, name: str, what: str) -> Never:
    raise DataError(
        f"{printable(path)}: {printable(name)} {what}. Expected the class of each image, as whole numbers [N] or "
        "[N,1], one-hot [N,classes] or text [N]; mend it, or take it out to score without classes."
    )


def _shortened(names: Iterable[str]) -> str:
    listed = [printable(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _square(path: Path, width: int, height: int) -> int:
    if width != height:
        raise DataError(
            f"the images of {printable(path)} are {width} x {height} pixels; expected squares. Crop them yourself, as "
            "the real images are cropped."
        )
    return height


def _guarded(file: Path, use: Any) -> Any:
    try:
        if not file.is_file():
            raise DamagedImage("missing, or not a regular file")  # opening a pipe would wait for ever
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


def _class_of(path: str, class_ids: Mapping[str, int]) -> int:
    """Return the id of the outermost folder that is a class, as in training, else of the file's name, else -1."""
    *folders, file = path.split(os.sep)
    stem = os.path.splitext(file)[0]
    matched = _NUMBERED.fullmatch(stem)
    names = (*folders, matched.group(1) if matched else stem)
    return next((class_ids[name] for name in names if name in class_ids), -1)
