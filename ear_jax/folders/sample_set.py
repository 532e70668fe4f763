"""A set of drawn images on disk: what it was made from, what is missing of it; every request in a folder of its own.

Images reach the disk batch by batch, so that an interrupted set goes on where it was and memory does not grow with it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ear_jax.array_files import open_archive
from ear_jax.errors import StorageError
from ear_jax.files import as_storage_error, check_free_space, digest_of, read_json, write_json
from ear_jax.folders.pictures import sample_name, save_images, save_npz
from ear_jax.sampling import Sampling

RECORD = "made_from.json"
_IMAGES = re.compile(r"\d{6,}_.*\.png|samples_\d+\.(npz|partial)|grid\.png")


def choose_folder(folder: Path, request: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Return where a request's images go: `folder`, or a sibling where it holds those of another; and why, if so."""
    found = read_json(folder / RECORD)
    if found is not None and isinstance(found.get("sampling"), dict):
        # An option that an earlier version did not have was what it is where nobody asks.
        found["sampling"] = {**Sampling(()).record(), **found["sampling"]}
    if not _holds_images(folder) or found == request:
        return folder, None
    other = folder.with_name(f"{folder.name}-{digest_of(json.dumps(request, sort_keys=True))[:8]}")
    if found is None:
        return other, f"{folder} has images and no record of what they were made from; they are kept"
    was, wanted = _flat(found), _flat(request)
    changed = [
        f"{name} {json.dumps(was.get(name))} → {json.dumps(wanted.get(name))}"
        for name in sorted(was.keys() | wanted.keys())
        if was.get(name) != wanted.get(name)
    ]
    return other, f"{folder} has images of another request ({_short('; '.join(changed))}); they are kept"


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return single values by name, so that what differs of a group can be named."""
    groups = (value if isinstance(value, dict) else {name: value} for name, value in request.items())
    return {name: value for group in groups for name, value in group.items()}


def _holds_images(folder: Path) -> bool:
    try:
        return any(_IMAGES.fullmatch(path.name) for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _short(text: str) -> str:
    return text if len(text) < 300 else f"{text[:297]} …"


class SampleSet:
    """The images of one request as files, `000000_circle.png` and so on."""

    def __init__(self, folder: Path, labels: np.ndarray, class_names: tuple[str, ...], image_px: int) -> None:
        """Look at what is there; nothing is written."""
        self.folder, self.labels, self.class_names = folder, labels, class_names
        self.image_px = image_px

    def begin(self, request: Mapping[str, Any]) -> None:
        """Make the folder and record what its images are made from; raises StorageError."""
        write_json(self.folder / RECORD, request)

    def sweep(self) -> None:
        """Delete what a killed process left half written; only while nobody else writes here."""
        for path in self.folder.glob(".*.writing"):
            path.unlink(missing_ok=True)

    def missing(self, batch_size: int) -> list[tuple[int, int]]:
        """Return the ranges (first, end) to draw: of whole batches, as an image's last bits may depend on them."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        holes = [i for i, label in enumerate(self.labels) if sample_name(i, self.class_names[label]) not in there]
        ranges: list[tuple[int, int]] = []
        for batch in sorted({hole // batch_size for hole in holes}):
            first, end = batch * batch_size, min((batch + 1) * batch_size, len(self.labels))
            if ranges and ranges[-1][1] == first:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((first, end))
        return ranges

    def write(self, first: int, images: np.ndarray) -> None:
        """Put images on disk, the first of them with the number `first`; raises StorageError."""
        labels = self.labels[first : first + len(images)]
        save_images(self.folder, images, labels, start_index=first, class_names=self.class_names)

    def finish(self) -> None:
        """Make the set whole once nothing is missing; raises StorageError."""

    def first(self, count: int) -> np.ndarray:
        """Return the first images as they are on disk, uint8 [count, px, px, 3]."""
        names = [sample_name(i, self.class_names[label]) for i, label in enumerate(self.labels[:count])]
        return np.stack([np.asarray(Image.open(self.folder / name)) for name in names])


class PackedSampleSet(SampleSet):
    """The images of one request in one .npz, collected in a raw file beside it until all are there."""

    def __init__(self, folder: Path, labels: np.ndarray, class_names: tuple[str, ...], image_px: int) -> None:
        """Name the two files."""
        super().__init__(folder, labels, class_names, image_px)
        self.path = folder / f"samples_{len(labels)}.npz"
        self._raw = self.path.with_suffix(".partial")
        self._image_bytes = 3 * image_px**2

    def begin(self, request: Mapping[str, Any]) -> None:
        """Also make sure that both files have room; raises StorageError."""
        super().begin(request)
        there = self._raw.stat().st_size if self._raw.exists() else 0
        check_free_space(self.folder, 2 * len(self.labels) * self._image_bytes - there, "set of samples")

    def missing(self, batch_size: int) -> list[tuple[int, int]]:
        """Return what follows the last whole batch in the raw file."""
        if self.path.exists():
            return []
        count = len(self.labels)
        done = self._raw.stat().st_size // self._image_bytes if self._raw.exists() else 0
        first = count if done == count else done // batch_size * batch_size
        return [(first, count)] if first < count else []

    def write(self, first: int, images: np.ndarray) -> None:
        """Append images to the raw file, over whatever a killed process left of them."""
        try:
            with open(self._raw, "r+b" if self._raw.exists() else "w+b") as file:
                file.truncate(first * self._image_bytes)
                file.seek(0, 2)
                file.write(images.tobytes())
        except OSError as error:
            raise as_storage_error(error, f"writing {self._raw}") or StorageError(f"{self._raw}: {error}") from error

    def finish(self) -> None:
        """Turn the raw file into the .npz, through a memory map."""
        if not self.path.exists():
            shape = (len(self.labels), self.image_px, self.image_px, 3)
            save_npz(self.path, np.memmap(self._raw, np.uint8, "r", shape=shape), self.labels)
        self._raw.unlink(missing_ok=True)

    def first(self, count: int) -> np.ndarray:
        """Read them from the front of the .npz, which does not compress."""
        count = min(count, len(self.labels))
        with open_archive(self.path) as archive, archive.stream("arr_0") as (file, _):
            data = file.read(count * self._image_bytes)
        return np.frombuffer(data, np.uint8).reshape(count, self.image_px, self.image_px, 3)
