"""Image files in class sub-folders, in whatever layout people have them: found, checked, split and read.

Layouts: PATH/{train,val|validation|test}/CLASS/..., PATH/CLASS/... (a fixed fraction is held out), or PATH/*.jpg (one
class). Class ids follow the sorted folder names. Decoding is `images.py`.
"""

import concurrent.futures
import errno
import hashlib
import os
from collections.abc import Callable
from io import BufferedReader
from typing import TypeVar

from ear_jax.config.schema import DataConfig
from ear_jax.data.images import EXTENSIONS, DamagedImage, DecodeRules, check_header, printable
from ear_jax.data.sources import Quarantine, Split
from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.files import digest_of

_EVAL_FOLDERS = ("val", "validation", "test")
_SPLIT_FOLDERS = frozenset({"train", *_EVAL_FOLDERS})
_MOST_HEADERS = 100_000  # opening more files than this before the first step would take minutes
_UNREADABLE = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO}
)

_T = TypeVar("_T")
_Item = tuple[str, int, int]
"""Path below the root, class id, size in bytes."""


class FolderSource:
    """Encoded images of one split of a folder; damaged headers are quarantined at opening."""

    def __init__(self, path: str, split: Split, config: DataConfig, rules: DecodeRules) -> None:
        self._root = os.path.expanduser(path)
        self._rules = rules
        if not os.path.isdir(self._root):
            raise ConfigError(f"config.data.source: {printable(path)!r} is not a folder; expected folder:PATH")
        notes: list[str] = []
        base, held_out = _locate(self._root, split)
        train = base if held_out else os.path.join(self._root, "train")
        folders = _class_folders(train)
        self.class_names = tuple(printable(os.path.basename(folder)) for folder in folders)
        if base != train:
            known = {os.path.basename(folder): label for label, folder in enumerate(folders)}
            strange = [f for f in _class_folders(base) if os.path.basename(f) not in known]
            if strange:
                raise DataError(
                    f"{printable(base)} has classes that the training folder lacks: {_listed(strange)}. "
                    "Both must use the same class folder names"
                )
            folders = [os.path.join(base, os.path.basename(f)) for f in folders]
        items, ignored = _scan(self._root, base, folders)
        if ignored:
            notes.append(f"{ignored} files were ignored: no image extension, or beside the class folders")
        if not items:
            raise DataError(f"no images in {printable(base)}; expected {_wanted()}")
        empty = sorted(set(range(len(folders))) - {label for _, label, _ in items})
        if empty and split == "train":
            raise DataError(
                f"{len(empty)} class folders hold no images: {_listed([folders[k] for k in empty])}. "
                "Remove them or put images into them"
            )
        self.quarantine = Quarantine(len(items), config.max_bad_fraction)
        items = self._check_headers(items, config.decode_threads)
        lost = sorted(set(range(len(folders))) - {label for _, label, _ in items})
        if lost and split == "train":
            raise DataError(f"all images are damaged in {_listed([folders[k] for k in lost])}")
        if held_out:
            items = _hold_out(items, split, config.eval_fraction, config.eval_images, self._root)
        elif split == "eval":
            items = sorted(items, key=_rank)[: config.eval_images]
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

    def _check_headers(self, items: list[_Item], threads: int) -> list[_Item]:
        def fault_of(item: _Item) -> str:
            path, _, size = item
            try:
                if len(items) <= _MOST_HEADERS:
                    _with_file(os.path.join(self._root, path), lambda file: check_header(file, self._rules))
                elif size == 0:
                    raise DamagedImage("empty file")
            except DamagedImage as fault:
                return str(fault)
            return ""

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            faults = list(pool.map(fault_of, items, chunksize=256))
        for (path, _, _), fault in zip(items, faults, strict=True):
            if fault:
                self.quarantine.add(path, fault, enforce=False)
        self.quarantine.enforce()
        return [item for item, fault in zip(items, faults, strict=True) if not fault]


def _locate(root: str, split: Split) -> tuple[str, bool]:
    """Return the folder a split is read from, and whether evaluation images are held out of it."""
    folders = {os.path.basename(folder) for folder in _sub_folders(root)}
    # A class may be called "train": only folders of folders are taken for splits.
    if "train" not in folders or not folders <= _SPLIT_FOLDERS or not _sub_folders(os.path.join(root, "train")):
        return root, True
    for name in _EVAL_FOLDERS:
        if name in folders and _sub_folders(os.path.join(root, name)):
            return os.path.join(root, "train" if split == "train" else name), False
    return os.path.join(root, "train"), True


def _class_folders(base: str) -> list[str]:
    return _sub_folders(base) or [base]


def _sub_folders(folder: str) -> list[str]:
    """List visible sub-folders, sorted by their bytes; links that lead back up the tree are left out."""
    here = os.path.realpath(folder)
    found = []
    for entry in _entries(folder):
        if entry.name.startswith((".", "__")):
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link that points at itself
            continue
        if is_folder and not (entry.is_symlink() and (here + os.sep).startswith(os.path.realpath(entry.path) + os.sep)):
            found.append(entry.path)
    return sorted(found, key=os.fsencode)


def _scan(root: str, base: str, folders: list[str]) -> tuple[list[_Item], int]:
    """Find the image files of each class folder, sorted, and count other files. Links to folders are not followed."""
    items: list[_Item] = []
    ignored = 0
    if folders != [base]:
        ignored += sum(_is_image(entry.name) for entry in _entries(base) if not _is_folder(entry))
    for label, top in enumerate(folders):
        stack = [top] if os.path.isdir(top) else []
        found: list[_Item] = []
        while stack:
            for entry in _entries(stack.pop()):
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    stack.append(entry.path)
                elif _is_image(entry.name):
                    found.append((os.path.relpath(entry.path, root), label, _size(entry)))
                else:
                    ignored += 1
        items += sorted(found, key=lambda item: os.fsencode(item[0]))
    return items, ignored


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as fault:
        raise StorageError(f"cannot list {printable(folder)}: {fault.strerror}; check its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a dangling or circular link: reading it reports why


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


def _rank(item: _Item) -> bytes:
    """Order files by a hash of their name: the same on every machine, and stable when files are added."""
    return hashlib.blake2b(os.fsencode(item[0]), digest_size=8).digest()


def _hold_out(items: list[_Item], split: Split, fraction: float, most: int, root: str) -> list[_Item]:
    """Split by name: the lowest-ranked files are for evaluation, but every class keeps at least one for training.

    Only where every class has a single image do some lose it.
    """
    wanted = min(max(1, round(fraction * len(items))), most)
    left: dict[int, int] = {}
    for _, label, _ in items:
        left[label] = left.get(label, 0) + 1
    spare_none = max(left.values()) == 1 < len(items)
    held: list[_Item] = []
    for item in sorted(items, key=_rank):
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


def _listed(paths: list[str]) -> str:
    names = [printable(os.path.basename(path)) for path in paths]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _wanted() -> str:
    return "files like CLASS/name.jpg (JPEG, PNG, WebP, BMP, GIF, TIFF or PPM)"
