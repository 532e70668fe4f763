"""What a data set consists of, apart from where it lies: its files by relative name and size, and what changed in them.

A run keeps the listing of its images, so that a later call can tell the same images under a new path from other ones.
"""

import collections
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from ear_jax.config.schema import DataConfig
from ear_jax.data.images import printable
from ear_jax.data.tfds import TfdsSource
from ear_jax.data.tree import is_image, is_no_class
from ear_jax.errors import DataError, StorageError
from ear_jax.files import digest_of, write_bytes

Listing = dict[str, dict[str, int]]
"""Size in bytes (-1: cannot be told) by file name, by folder below the root."""

_SHOWN = 4
_SMALL_BYTES, _MOST_TIMES = 1 << 20, 32  # unpacked; names and sizes take about six times less when packed


def listing_of(config: DataConfig) -> Listing | None:
    """Return what `config.source` consists of; None where a folder is not there, {} for data that is made from keys.

    Raises:
        StorageError: a folder cannot be listed.
        DataError: a tfds set is not prepared.
    """
    kind, _, argument = config.source.partition(":")
    if kind == "tfds":
        splits = [TfdsSource(argument, split, config).digest for split in ("train", "eval")]
        return {"tfds": {digest: 0 for digest in splits}}
    return list_images(os.path.expanduser(argument)) if kind == "folder" else {}


def list_images(root: str) -> Listing | None:
    """List the image files below a folder as training finds them, one `stat` a file; None where there is no folder."""
    if not os.path.isdir(root):
        return None
    found: Listing = {}
    waiting = [("", root)]
    while waiting:
        name, folder = waiting.pop()
        sizes: dict[str, int] = {}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    # Links to folders are followed where they can be classes: at the top, and below a split folder.
                    if entry.is_dir(follow_symlinks=name.count("/") < 1 and not _leads_up(entry, folder)):
                        if not is_no_class(entry.name):
                            waiting.append((f"{name}/{entry.name}".lstrip("/"), entry.path))
                    elif is_image(entry.name) and not entry.name.startswith("."):
                        sizes[entry.name] = _size(entry)
        except OSError as fault:
            raise StorageError(f"cannot list {printable(folder)}: {fault.strerror}; check its permissions") from None
        if sizes:
            found[name] = sizes
    return found


def digest(listing: Listing) -> str:
    """Return a digest of a listing, whatever the order in which it was found."""
    rows = (
        f"{folder}\0{name}\0{size}\n" for folder in sorted(listing) for name, size in sorted(listing[folder].items())
    )
    return digest_of(*("".join(rows).encode("utf-8", "surrogateescape"),))


def save(path: Path, source: str, listing: Listing) -> None:
    """Write a listing, and the `data.source` that it is of."""
    document = {"version": 1, "source": source, "folders": listing}
    write_bytes(path, gzip.compress(json.dumps(document).encode(), 1, mtime=0))


def load(path: Path) -> tuple[str, Listing] | None:
    """Return the source and the listing that `save` wrote, or None where there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        with gzip.open(path) as file:  # its own checksum guards it
            most = _SMALL_BYTES + _MOST_TIMES * path.stat().st_size
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it unpacks to more than {most} bytes")
        document = json.loads(text.decode("utf-8"))
        source, listing = document["source"], document["folders"]
        sizes = itertools.chain.from_iterable(files.values() for files in listing.values())
        if not isinstance(source, str) or not all(type(size) is int for size in sizes):
            raise ValueError("it is no list of files and sizes")
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as fault:
        raise DataError(
            f"{path}, the list of the run's images, is damaged ({fault!s:.200}). Expected what this program wrote: "
            "bring back a copy, or delete it when you know that the images are the same."
        ) from None
    return source, listing


def changes(before: Listing, after: Listing) -> list[str]:
    """Say in a few lines what changed: moved to another folder, added, removed, of another size; nothing if nothing.

    A file counts as moved where one of its name and size is gone elsewhere.
    """
    was, now = _flat(before, after), _flat(after, before)
    resized = sorted(path for path in was.keys() & now.keys())
    removed, added = was.keys() - now.keys(), now.keys() - was.keys()
    places: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for path in sorted(removed, reverse=True):
        places[path.rpartition("/")[2], was[path]].append(path)
    moved = {}
    for path in sorted(added):
        if candidates := places.get((path.rpartition("/")[2], now[path])):
            moved[path] = candidates.pop()
    added, removed = sorted(added - moved.keys()), sorted(removed - set(moved.values()))
    pairs = [f"{old} -> {new}" for new, old in sorted(moved.items())]
    told = (
        ("moved to another folder (relabelled, where it is another class)", pairs),
        ("added", added),
        ("removed", removed),
        ("of another size", resized),
        ("new folders", sorted(after.keys() - before.keys())),
        ("folders without images now", sorted(before.keys() - after.keys())),
    )
    return [f"{len(names)} {what}: {_few(names)}" for what, names in told if names]


def _flat(mine: Listing, other: Listing) -> dict[str, int]:
    """Return path to size of what the other listing has not just so."""
    flat = {}
    for folder, sizes in mine.items():
        theirs: Mapping[str, int] = other.get(folder, {})
        if sizes != theirs:
            for name, size in sizes.items():
                if theirs.get(name) != size:
                    flat[f"{folder}/{name}".lstrip("/")] = size
    return flat


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more


def _leads_up(entry: os.DirEntry[str], folder: str) -> bool:
    return entry.is_symlink() and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(entry.path) + os.sep)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
