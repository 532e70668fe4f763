"""What a data set consists of, apart from where it lies: its files by relative name, size, time and content.

A run keeps the listing of its images, so that a later call can tell the same images under a new path from other ones.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from ear_jax.array_files import open_archive
from ear_jax.config.schema import DataConfig
from ear_jax.data.folder_files import FolderFiles, find_files
from ear_jax.data.folder_index import SMALLEST_KEPT, joined, split
from ear_jax.data.images import printable
from ear_jax.data.tfds import TfdsSource
from ear_jax.errors import DataError
from ear_jax.files import atomic_file, digest_of

_SHOWN = 4
_PLAIN = {
    name: (np.dtype(kind), 1) for name, kind in (("names", "u1"), ("sizes", "i8"), ("times", "i8"), ("contents", "u8"))
}
_MOST_DIGESTED_BYTES = 1 << 30
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files of a data set, ordered by name.

    Attributes:
        names: below the root, brought together by `folder_index.joined`.
        sizes: in bytes; -1 where it cannot be told.
        times: of change in ns; copying a folder changes them, and so they identify nothing.
        contents: a digest of each file; empty where there is too much to read (`with_contents`).
    """

    names: UInt8[np.ndarray, " bytes"]
    sizes: Int64[np.ndarray, " n"]
    times: Int64[np.ndarray, " n"]
    contents: UInt64[np.ndarray, " m"] = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def digest(self) -> str:
        """Identify the files by name, size and content, or time where contents are not known."""
        told = self.contents if len(self.contents) else self.times
        return digest_of(*(array.tobytes() for array in (self.names, self.sizes, told)))

    def has_files_of(self, other: "Listing") -> bool:
        """Tell whether names and sizes are the same."""
        return np.array_equal(self.names, other.names) and np.array_equal(self.sizes, other.sizes)


def listing_of(config: DataConfig) -> Listing | None:
    """Return the files that training and evaluation read of `config.source`; none for data that is made from keys.

    Returns None where a folder is not there.

    Raises:
        StorageError: a folder cannot be listed.
        DataError: a tfds set is not prepared, or a folder could be splits as well as classes.
    """
    kind, _, argument = config.source.partition(":")
    if kind == "tfds":
        splits = sorted(TfdsSource(argument, split, config).digest for split in ("train", "eval"))
        return Listing(joined(splits), np.zeros(2, np.int64), np.zeros(2, np.int64))
    if kind != "folder":
        return of_files()
    if not os.path.isdir(os.path.expanduser(argument)):
        return None
    train = find_files(argument, "train", config)
    return of_files(train) if train.is_shared else of_files(train, find_files(argument, "eval", config))


def of_files(*splits: FolderFiles) -> Listing:
    """Return the listing of the files of splits."""
    names = [path for files in splits for path, _, _ in files.items]
    sizes = np.fromiter((size for files in splits for _, _, size in files.items), np.int64, len(names))
    times = np.concatenate([files.times for files in splits]) if splits else sizes
    order = np.asarray(sorted(range(len(names)), key=names.__getitem__), np.int64)
    return Listing(joined(names[place] for place in order.tolist()), sizes[order], times[order])


def with_contents(listing: Listing, config: DataConfig) -> Listing:
    """Return the listing of `config.source` with a digest of each file, where they are few: it takes reading them.

    Few is less than 100,000 files of 1 GiB altogether: of more, an index hides what is overwritten in place.
    """
    kind, _, root = config.source.partition(":")
    if kind != "folder" or len(listing) >= SMALLEST_KEPT or listing.sizes.sum() > _MOST_DIGESTED_BYTES:
        return listing
    return dataclasses.replace(listing, contents=_contents(root, split(listing.names), config.decode_threads))


def differing(before: Listing, after: Listing, config: DataConfig) -> tuple[list[str], bool]:
    """Return the files of one name and size whose times differ, and whether that is known to be another content.

    Where the earlier listing has digests, files whose times differ are read, and only those of other content returned.
    """
    places = np.flatnonzero(before.times != after.times)
    if not len(places):
        return [], False
    names = split(after.names)
    chosen = [names[place] for place in places.tolist()]
    if not len(before.contents):
        return chosen, False
    found = _contents(config.source.partition(":")[2], chosen, config.decode_threads)
    return [name for name, was, now in zip(chosen, before.contents[places], found, strict=True) if was != now], True


def save(path: Path, source: str, listing: Listing) -> None:
    """Write a listing, and the `data.source` that it is of; raises StorageError."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        arrays = {field.name: getattr(listing, field.name) for field in dataclasses.fields(listing)}
        np.savez(file, source=joined([source]), **arrays)  # packed names would look like a bomb


def load(path: Path) -> tuple[str, Listing] | None:
    """Return the source and the listing that `save` wrote, or None where there is none.

    Raises:
        DataError: it is damaged.
    """
    if not path.exists():
        return None
    advice = "It is the list of the run's images: bring back a copy, or delete it when you know that they are the same."
    with open_archive(path, advice) as kept:
        arrays = {field.name: kept.read(field.name) for field in dataclasses.fields(Listing)}
        source = kept.read("source")
    if {name: (array.dtype, array.ndim) for name, array in arrays.items()} == _PLAIN and source.dtype == np.uint8:
        count = len(split(arrays["names"]))
        if (
            len(arrays["sizes"]) == len(arrays["times"]) == count
            and len(arrays["contents"]) in (0, count)
            and len(source)
        ):
            return split(source)[0], Listing(**arrays)
    raise DataError(f"{path} holds no list of files. {advice}")


def changes(before: Listing, after: Listing) -> list[str]:
    """Say in a few lines what changed: moved to another folder, added, removed, of another size; nothing if nothing.

    A file counts as moved where one of its name and size is gone elsewhere.
    """
    was, now = (dict(zip(split(listing.names), listing.sizes.tolist(), strict=True)) for listing in (before, after))
    removed, added = was.keys() - now.keys(), now.keys() - was.keys()
    places: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for path in sorted(removed, reverse=True):
        places[os.path.basename(path), was[path]].append(path)
    moved = {}
    for path in sorted(added):
        if candidates := places.get((os.path.basename(path), now[path])):
            moved[path] = candidates.pop()
    folders = [{os.path.dirname(path) for path in listing} for listing in (was, now)]
    told = (
        (
            "moved to another folder (relabelled, where it is another class)",
            [f"{old} -> {new}" for new, old in sorted(moved.items())],
        ),
        ("added", sorted(added - moved.keys())),
        ("removed", sorted(removed - set(moved.values()))),
        ("of another size", sorted(path for path in was.keys() & now.keys() if was[path] != now[path])),
        ("new folders", sorted(folders[1] - folders[0])),
        ("folders without images now", sorted(folders[0] - folders[1])),
    )
    return [f"{len(names)} {what}: {few(names)}" for what, names in told if names]


def few(names: list[str]) -> str:
    """Return a few names in a line."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more


def _contents(root: str, names: list[str], threads: int) -> UInt64[np.ndarray, " n"]:
    folder = os.path.expanduser(root)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda name: _content(os.path.join(folder, name)), names)
        return np.fromiter(digests, np.uint64, len(names))


def _content(path: str) -> int:
    """Return a digest of a file, 0 where it cannot be read: opening it for training says why."""
    state = hashlib.blake2b(digest_size=8)
    try:
        if not os.path.isfile(path):
            return 0  # opening a pipe would wait for ever
        with open(path, "rb") as file:
            while block := file.read(_READ_BYTES):
                state.update(block)
    except OSError:
        return 0
    return int.from_bytes(state.digest(), "little")
