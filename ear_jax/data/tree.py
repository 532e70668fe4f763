"""A folder of images walked: one rule, for training and for scored images, of what is an image and what is none.

Hidden files and folders, and what operating systems and servers leave behind, are neither images nor classes.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable

from ear_jax.data.images import EXTENSIONS, printable
from ear_jax.errors import StorageError

_LEFT_BEHIND = frozenset(
    {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "recycler"}
    | {"system volume information", "found.000", "@__thumb", "network trash folder", "temporary items"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
_NUMBER = re.compile(r"[0-9]+")


class Dropped:
    """What a walk left out, counted by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one file or folder."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, printable(name))

    @property
    def notes(self) -> list[str]:
        """One sentence a reason, with an example."""
        return [f"{count} ignored: {reason} (such as {self.examples[reason]})" for reason, count in self.counts.items()]


def is_no_class(name: str) -> bool:
    """Tell whether a folder is hidden, begins with `__`, or is one that a system left behind."""
    return name.startswith((".", "__")) or name.lower() in _LEFT_BEHIND


def is_image(name: str) -> bool:
    """Tell by the extension whether a file is to be looked at."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def entries(folder: str) -> list[os.DirEntry[str]]:
    """List a folder; raises StorageError where that is not allowed."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as fault:
        raise StorageError(f"cannot list {printable(folder)}: {fault.strerror}; check its permissions") from None


def sub_folders(folder: str, dropped: Dropped | None = None) -> list[str]:
    """List sub-folders that can be classes, sorted by their bytes; links that lead back up the tree are left out."""
    here = os.path.realpath(folder)
    found = []
    for entry in entries(folder):
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link that points at itself
            continue
        if not is_folder:
            continue
        if is_no_class(entry.name):
            if dropped:
                dropped.add("hidden or system folders", entry.name)
        elif not (entry.is_symlink() and (here + os.sep).startswith(os.path.realpath(entry.path) + os.sep)):
            found.append(entry.path)
    return sorted(found, key=os.fsencode)


def walk(
    top: str, root: str, dropped: Dropped, *, is_deep: bool = True, seen: dict[str, int] | None = None
) -> list[tuple[str, int]]:
    """Return path below `root` and size in bytes of the images in a folder, sorted; -1 where a size cannot be read.

    Links to folders are not followed. Without `is_deep`, sub-folders are passed over. `seen` takes up the folders
    that were listed, with their times of change in ns.
    """
    start = len(os.path.join(root, ""))
    found: list[tuple[str, int]] = []
    stack = [top]
    while stack:
        folder = stack.pop()
        if seen is not None:
            seen[folder] = os.stat(folder).st_mtime_ns  # before the listing: what changes later is noticed later
        for entry in entries(folder):
            name = entry.name
            if entry.is_dir(follow_symlinks=False):
                if not is_deep:
                    continue
                if is_no_class(name):
                    dropped.add("hidden or system folders", entry.path[start:])
                else:
                    stack.append(entry.path)
            elif name.startswith(".") or name.lower() in _LEFT_BEHIND:
                dropped.add("hidden or system files", entry.path[start:])
            elif is_image(name):
                found.append((entry.path[start:], _size(entry)))
            elif is_deep or not os.path.isdir(entry.path):  # a link to a class folder is read as one
                dropped.add("files without an image extension", entry.path[start:])
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def class_order(names: Iterable[str], order: str = "auto") -> list[str]:
    """Sort class names: as numbers where all are whole numbers and `order` is not "text", else by their bytes."""
    by_text = sorted(names, key=os.fsencode)
    is_numbered = order != "text" and all(_NUMBER.fullmatch(name) for name in by_text)
    return sorted(by_text, key=int) if is_numbered else by_text


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a dangling or circular link: reading it reports why
