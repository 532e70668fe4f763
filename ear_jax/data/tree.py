"""A folder of images walked: one rule, for training and for scored images, of what is an image and what is none.

Hidden files and folders, and what operating systems and servers leave behind, are neither images nor classes.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

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

    def add_all(self, other: "Dropped") -> None:
        """Count what another walk left out."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

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


Found = tuple[str, int, int]
"""Path below the root, size in bytes, time of change in ns; -1 and 0 where they cannot be read."""


def walk(
    top: str, root: str, dropped: Dropped, *, is_deep: bool = True, seen: dict[str, int] | None = None
) -> list[Found]:
    """Return the images in a folder, sorted by the bytes of their paths.

    Links to folders are not followed. Without `is_deep`, sub-folders are passed over. `seen` takes up the folders
    that were listed, with their times of change in ns.
    """
    start = len(os.path.join(root, ""))
    found: list[Found] = []
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
                found.append((entry.path[start:], *_size_and_time(entry)))
            elif is_deep or not os.path.isdir(entry.path):  # a link to a class folder is read as one
                dropped.add("files without an image extension", entry.path[start:])
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def class_order(names: Iterable[str], order: str = "auto") -> list[str]:
    """Sort class names: as numbers where all are whole numbers and `order` is not "text", else by their bytes."""
    by_text = sorted(names, key=os.fsencode)
    is_numbered = order != "text" and all(_NUMBER.fullmatch(name) for name in by_text)
    return sorted(by_text, key=int) if is_numbered else by_text


def order_hint(class_names: Sequence[str]) -> str:
    """Return a sentence for a digest that differs, where classes are sorted as numbers: earlier versions did not."""
    if list(class_names) == class_order(class_names, "text"):
        return ""
    return (
        " Its classes are sorted as numbers; a run of an earlier version that has lost its config.json goes on with "
        "--config.data.class_order=text."
    )


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return -1, 0  # a dangling or circular link: reading it reports why
    return status.st_size, status.st_mtime_ns
