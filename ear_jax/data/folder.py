"""Image files in class sub-folders: checked, split and read; `folder_files.py` finds them, `images.py` decodes them."""

import concurrent.futures
import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import TypeVar

import numpy as np

from ear_jax.config.schema import DataConfig
from ear_jax.data.folder_files import find_files, listed
from ear_jax.data.folder_index import SMALLEST_KEPT, Item
from ear_jax.data.images import DamagedImage, DecodeRules, check_header, printable
from ear_jax.data.layout import refuse_one_level_too_high
from ear_jax.data.sources import Quarantine, Split
from ear_jax.errors import DataError, StorageError
from ear_jax.files import digest_of

_UNREADABLE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}
)

_T = TypeVar("_T")


class FolderSource:
    """Encoded images of one split of a folder; damaged headers are quarantined at opening."""

    def __init__(self, path: str, split: Split, config: DataConfig, rules: DecodeRules) -> None:
        files = find_files(path, split, config)
        self._root, self._rules, self.class_names = files.root, rules, files.class_names
        items, base, folders, notes = files.items, files.base, files.folders, list(files.notes)
        if files.strange:
            raise DataError(
                f"{printable(base)} has classes that the training folder lacks: {listed([*files.strange])}. "
                "Both must use the same class folder names"
            )
        if not items:
            raise DataError(f"no images in {printable(base)}; expected {_wanted()}")
        if split == "train" and files.has_classes:
            names = [os.path.basename(folder) for folder in folders]
            notes += refuse_one_level_too_high(self._root, base, names, items, config.layout)
        if len(folders) == 1 and split == "train":
            notes.append(f"one class only: {self.class_names[0]}")
        empty = sorted(set(range(len(folders))) - {label for _, label, _ in items})
        if empty and split == "train":
            raise DataError(
                f"{len(empty)} class folders hold no images: {listed([folders[k] for k in empty])}. "
                "Remove them or put images into them"
            )
        self.quarantine = Quarantine(len(items), config.max_bad_fraction)
        items = self._check_headers(items, config.decode_threads)
        lost = sorted(set(range(len(folders))) - {label for _, label, _ in items})
        if lost and split == "train":
            raise DataError(f"all images are damaged in {listed([folders[k] for k in lost])}")
        if files.is_shared:
            items = _hold_out(items, split, config.eval_fraction, config.eval_images, self._root)
        elif split == "eval":
            items = list(itertools.islice(_ranked(items), config.eval_images))
        if split == "train" and len({label for _, label, _ in items}) < len(folders):
            notes.append("classes of one image were held out for evaluation: some classes have no training image")
        self.notes = tuple(notes)
        self._items = items
        self.digest = digest_of("folder", self.class_names, items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return the file's bytes and its class id; raises DamagedImage when it cannot be read."""
        path, label, _ = self._items[index]
        data = _with_file(os.path.join(self._root, path), lambda file: file.read(self._rules.max_bytes + 1))
        if len(data) > self._rules.max_bytes:
            raise DamagedImage(f"larger than {self._rules.max_bytes} bytes")
        return data, label

    def name(self, index: int) -> str:
        """Return the path of an image below the folder."""
        return self._items[index][0]

    def _check_headers(self, items: list[Item], threads: int) -> list[Item]:
        def fault_of(item: Item) -> str:
            try:
                _with_file(os.path.join(self._root, item[0]), lambda file: check_header(file, self._rules))
            except DamagedImage as fault:
                return str(fault)
            return ""

        if len(items) >= SMALLEST_KEPT:  # opening so many before the first step would take minutes
            faults = ["" if size else "empty file" for _, _, size in items]
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                faults = list(pool.map(fault_of, items))
        if not any(faults):
            return items
        for (path, _, _), fault in zip(items, faults, strict=True):
            if fault:
                self.quarantine.add(path, fault, enforce=False)
        self.quarantine.enforce()
        return [item for item, fault in zip(items, faults, strict=True) if not fault]


def _with_file(path: str, use: Callable[[BufferedReader], _T]) -> _T:
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise DamagedImage("not a regular file")  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            return use(file)
    except OSError as fault:
        if fault.errno in _UNREADABLE:
            raise DamagedImage(f"unreadable: {fault.strerror}") from None
        raise StorageError(f"cannot read {printable(path)}: {fault.strerror}") from None


def _ranked(items: list[Item]) -> Iterator[Item]:
    """Order files by a hash of their name: the same on every machine, and stable when files are added."""
    names = os.fsencode("\0".join(item[0] for item in items)).split(b"\0")  # one call instead of a million
    hashes = b"".join([hashlib.blake2b(name, digest_size=8).digest() for name in names])
    return (items[place] for place in np.argsort(np.frombuffer(hashes, ">u8"), kind="stable"))


def _hold_out(items: list[Item], split: Split, fraction: float, most: int, root: str) -> list[Item]:
    """Split by name: the lowest-ranked files are for evaluation, but every class keeps at least one for training.

    Only where every class has a single image do some lose it.
    """
    wanted = min(max(1, round(fraction * len(items))), most)
    left: dict[int, int] = {}
    for _, label, _ in items:
        left[label] = left.get(label, 0) + 1
    spare_none = max(left.values()) == 1 < len(items)
    held: list[Item] = []
    for item in _ranked(items):
        if len(held) == wanted:
            break
        if left[item[1]] > 1 or spare_none:
            left[item[1]] -= 1
            held.append(item)
    if split == "eval":
        if not held:
            raise DataError(f"{printable(root)} has a single image: none can be held out for evaluation; add images")
        return held
    names = {item[0] for item in held}
    return [item for item in items if item[0] not in names]


def _wanted() -> str:
    return "files like CLASS/name.jpg (JPEG, PNG, WebP, BMP, GIF, TIFF or PPM)"
