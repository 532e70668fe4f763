"""What a folder of images holds, without opening a file: which split lies where, its classes, its files.

Layouts: PATH/{train,val …}/CLASS/..., PATH/CLASS/... (a fixed fraction is held out), or PATH/*.jpg (one class).
`layout.py` tells them apart, `tree.py` says what is an image, `folder_index.py` keeps the list of a large folder.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Int64

from ear_jax.config.schema import DataConfig
from ear_jax.data.folder_index import Item, list_images
from ear_jax.data.images import printable
from ear_jax.data.layout import find_layout
from ear_jax.data.sources import Split
from ear_jax.data.tree import Dropped, class_order, sub_folders, walk
from ear_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FolderFiles:
    """The files that a split is drawn from.

    Attributes:
        root: the folder, expanded.
        base: the folder of the split: `root`, or one below it.
        folders: class folders below `base`, by class id; `base` alone where it has none.
        class_names: names by class id.
        items: the files, class by class.
        times: when each was changed, in ns; 0 where that cannot be read.
        is_shared: whether the evaluation images are held out of the training images.
        strange: classes of an evaluation folder that the training folder lacks.
        notes: what was understood, and what is not read.
    """

    root: str
    base: str
    folders: tuple[str, ...]
    class_names: tuple[str, ...]
    items: list[Item]
    times: Int64[np.ndarray, " n"]
    is_shared: bool
    strange: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_classes(self) -> bool:
        """Whether there are class folders."""
        return self.folders != (self.base,)


def find_files(path: str, split: Split, config: DataConfig) -> FolderFiles:
    """List the files of a split, or of both where the evaluation images are held out.

    Raises:
        ConfigError: there is no folder.
        DataError: what lies in it could be splits as well as classes.
        StorageError: a folder cannot be listed.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise ConfigError(f"config.data.source: {printable(path)!r} is not a folder; expected folder:PATH")
    layout = find_layout(root, config.layout)
    notes, dropped = list(layout.notes), Dropped()
    train = layout.train
    base = train if split == "train" or layout.held_out is None else layout.held_out
    known = {os.path.basename(folder) for folder in sub_folders(train, dropped)}
    names = class_order(known, config.class_order) or [os.path.basename(os.path.abspath(train))]
    if names != class_order(names, "text"):
        notes.append(
            f"class folders are numbered: ids follow the numbers ({listed(names, 4)}), not the text order "
            f"({listed(class_order(names, 'text'), 4)}); --config.data.class_order=text keeps that"
        )
    elif known and all(name.isdecimal() for name in names) and config.class_order == "text":
        notes.append(f"class folders are numbered, and ids follow the text order ({listed(names, 4)})")
    folders = [os.path.join(base, name) for name in names] if known else [base]
    strange: list[str] = []
    if base != train:
        strange = [f for f in sub_folders(base) if known and os.path.basename(f) not in known]
        absent = [f for f in folders if not os.path.isdir(f)]
        if absent:
            notes.append(f"{len(absent)} classes have no folder in {printable(base)}: {listed(absent)}")
    places = [(base, "class folders")] * bool(known) + [(root, "splits")] * (base != root)
    for folder, what in places:
        for beside, _, _ in walk(folder, root, dropped, is_deep=False):
            dropped.add(f"images beside the {what}", beside)
    items, times, indexed = list_images(root, folders, dropped)
    return FolderFiles(
        root=root,
        base=base,
        folders=tuple(folders),
        class_names=tuple(printable(name) for name in names),
        items=items,
        times=times,
        is_shared=layout.held_out is None,
        strange=tuple(strange),
        notes=(*notes, *indexed, *dropped.notes),
    )


def listed(paths: list[str], most: int = 10) -> str:
    """Return the last parts of paths in a line, at most so many of them."""
    names = [printable(os.path.basename(path)) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
