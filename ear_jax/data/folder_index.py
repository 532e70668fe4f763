"""The list of a large folder's images, kept in the user's cache: listing a million files again would take a minute.

An index holds as long as no folder has another time of change: adding, removing and renaming files changes it.
"""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ear_jax.array_files import open_archive
from ear_jax.data.tree import Dropped, walk
from ear_jax.errors import StorageError
from ear_jax.files import atomic_file, cache_folder, digest_of

SMALLEST_KEPT = 100_000
_SETTLED_NS = (
    2_000_000_000  # a folder changed later than this before the listing may change again within its clock tick
)

Item = tuple[str, int, int]
"""Path below the root, class id, size in bytes."""


def list_images(root: str, folders: Sequence[str], dropped: Dropped) -> tuple[list[Item], list[str]]:
    """Return the images of class folders, class by class, and a note where they come from an index.

    Of fewer than 100,000 images none is kept. The size of a file that was overwritten in place is the index's.
    """
    path = cache_folder() / "folders" / f"{digest_of(os.path.abspath(root), *folders)}.npz"
    kept = _read(path, dropped)
    if kept is not None:
        note = f"{len(kept)} files are listed from {path}, since no folder has changed; delete it to list them again"
        return kept, [note]
    started, seen, items = time.time_ns(), {}, []
    for label, folder in enumerate(folders):
        if os.path.isdir(folder):
            items += [(name, label, size) for name, size in walk(folder, root, dropped, seen=seen)]
    if len(items) >= SMALLEST_KEPT and max(seen.values()) < started - _SETTLED_NS:
        _write(path, items, seen, dropped)
    return items, []


def _write(path: Path, items: list[Item], seen: dict[str, int], dropped: Dropped) -> None:
    try:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                names=_joined(item[0] for item in items),
                labels=np.fromiter((item[1] for item in items), np.int32, len(items)),
                sizes=np.fromiter((item[2] for item in items), np.int64, len(items)),
                folders=_joined(seen),
                times=np.fromiter(seen.values(), np.int64, len(seen)),
                reasons=_joined(dropped.counts),
                examples=_joined(dropped.examples[reason] for reason in dropped.counts),
                counts=np.asarray(list(dropped.counts.values()), np.int64),
            )
    except StorageError:  # a cache that cannot be written costs time, nothing else
        return


def _read(path: Path, dropped: Dropped) -> list[Item] | None:
    """Return the items of an index that still holds, and add what its walk left out."""
    try:
        with open_archive(path) as kept:
            for folder, changed in zip(_split(kept.read("folders")), kept.read("times").tolist(), strict=True):
                if os.stat(folder).st_mtime_ns != changed:
                    return None
            names, labels, sizes = (kept.read(name) for name in ("names", "labels", "sizes"))
            items = list(zip(_split(names), labels.tolist(), sizes.tolist(), strict=True))
            reasons, examples, counts = (kept.read(name) for name in ("reasons", "examples", "counts"))
            told = zip(_split(reasons), _split(examples), counts.tolist(), strict=True)
            for reason, example, count in told:
                dropped.examples.setdefault(reason, example)
                dropped.counts[reason] = count
            return items
    except Exception:  # none there, or a damaged one: the folder is listed
        return None


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), np.uint8)


def _split(joined: np.ndarray) -> list[str]:
    return os.fsdecode(joined.tobytes()).split("\0") if len(joined) else []
