"""The list of a large folder's images, kept in the user's cache: listing a million files again would take a minute.

An index holds as long as no folder has another time of change: adding, removing and renaming files changes it. The
last ones are kept in memory too, so that one call lists a folder once.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

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


@dataclasses.dataclass(frozen=True)
class _Index:
    items: list[Item]
    times: np.ndarray
    folders: dict[str, int]
    dropped: Dropped
    is_written: bool = True

    def holds(self) -> bool:
        return all(os.stat(folder).st_mtime_ns == changed for folder, changed in self.folders.items())


_latest: dict[Path, _Index] = {}
"""Of a training and an evaluation folder, at most."""


def list_images(
    root: str, folders: Sequence[str], dropped: Dropped
) -> tuple[list[Item], Int64[np.ndarray, " n"], list[str]]:
    """Return the images of class folders, class by class, their times of change in ns, and a note on an index.

    Of fewer than 100,000 images none is kept. Size and time of a file that was overwritten in place are the index's.
    """
    path = cache_folder() / "folders" / f"{digest_of(os.path.abspath(root), *folders)}.npz"
    if kept := _known(path):
        dropped.add_all(kept.dropped)
        note = f"{len(kept.items)} files are listed from {path}, as no folder has changed; delete it to list them again"
        return kept.items, kept.times, [note]
    started, seen, items, times, left_out = time.time_ns(), {}, [], [], Dropped()
    for label, folder in enumerate(folders):
        if os.path.isdir(folder):
            found = walk(folder, root, left_out, seen=seen)
            items += [(name, label, size) for name, size, _ in found]
            times += [changed for _, _, changed in found]
    dropped.add_all(left_out)
    index = _Index(items, np.asarray(times, np.int64), seen, left_out)
    if len(items) >= SMALLEST_KEPT and max(seen.values()) < started - _SETTLED_NS:
        _remember(path, dataclasses.replace(index, is_written=_write(path, index)))
    return items, index.times, []


def _known(path: Path) -> _Index | None:
    try:
        if path not in _latest:
            _remember(path, _read(path))
        elif _latest[path].is_written and not path.exists():  # deleted, to have the folder listed again
            del _latest[path]
            return None
        return _latest[path] if _latest[path].holds() else None
    except Exception:  # none there, or a damaged one: the folder is listed
        return None


def _remember(path: Path, index: _Index) -> None:
    _latest[path] = index
    for old in list(_latest)[:-2]:
        del _latest[old]


def _write(path: Path, index: _Index) -> bool:
    items, dropped = index.items, index.dropped
    try:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                names=joined(item[0] for item in items),
                labels=np.fromiter((item[1] for item in items), np.int32, len(items)),
                sizes=np.fromiter((item[2] for item in items), np.int64, len(items)),
                times=index.times,
                folders=joined(index.folders),
                changed=np.fromiter(index.folders.values(), np.int64, len(index.folders)),
                reasons=joined(dropped.counts),
                examples=joined(dropped.examples[reason] for reason in dropped.counts),
                counts=np.asarray(list(dropped.counts.values()), np.int64),
            )
    except StorageError:  # a cache that cannot be written costs time, nothing else
        return False
    return True


def _read(path: Path) -> _Index:
    with open_archive(path) as kept:
        times = kept.read("times")
        items = list(zip(split(kept.read("names")), *(kept.read(n).tolist() for n in ("labels", "sizes")), strict=True))
        folders = dict(zip(split(kept.read("folders")), kept.read("changed").tolist(), strict=True))
        dropped, reasons = Dropped(), split(kept.read("reasons"))
        dropped.counts.update(dict(zip(reasons, kept.read("counts").tolist(), strict=True)))
        dropped.examples.update(zip(reasons, split(kept.read("examples")), strict=True))
    if len(times) != len(items):
        raise ValueError("as many times as names")
    return _Index(items, times, folders, dropped)


def joined(names: Iterable[str]) -> UInt8[np.ndarray, " n"]:
    """Return file names as one array."""
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)


def split(names: UInt8[np.ndarray, " n"]) -> list[str]:
    """Return the file names that `joined` brought together."""
    return os.fsdecode(names.tobytes()).split("\0") if len(names) else []
