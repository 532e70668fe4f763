"""Which folder holds the training images and which the evaluation images; what could be either is refused."""

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Never

from ear_jax.data.images import printable
from ear_jax.data.tree import sub_folders
from ear_jax.errors import DataError

_TRAIN = ("train", "training", "trn")
_HELD_OUT = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
_AROUND = re.compile(r"(set|images?|imgs?|photos|pictures|data|split|folder|[0-9]+|[ _.-])+")
"""What may stand before or behind such a word: `training_set`, `val2017`, `images-test`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the splits of a folder are.

    Attributes:
        train: folder of the training images: it holds class folders, or the images of a single class.
        held_out: folder of the evaluation images; None = they are held out of `train`.
        notes: what was understood.
    """

    train: str
    held_out: str | None = None
    notes: tuple[str, ...] = ()


def find_layout(root: str, wanted: str = "auto") -> Layout:
    """Tell splits from classes; `wanted` is `config.data.layout`.

    Raises:
        DataError: the sub-folders could be splits as well as classes; says what was found and which key decides.
    """
    folders = {os.path.basename(folder): folder for folder in sub_folders(root)}
    train, held = _named(folders, _TRAIN), _named(folders, _HELD_OUT)
    others = [name for name in folders if name not in (*train, *held)]
    if wanted == "classes" or not (train or held):
        if wanted == "splits":
            _refuse(root, "there is no training folder", "call it train, or say --config.data.layout=classes")
        return Layout(root)
    classes = {name: {os.path.basename(f) for f in sub_folders(folders[name])} for name in (*train, *held)}
    is_nested = any(classes[name] for name in (*train, *held))
    if wanted == "auto" and not is_nested and not (train and held) and (others or len(folders) == 1):
        taken = (
            f"{_listed([*train, *held])}: taken for a class, not for a split; --config.data.layout=splits changes that"
        )
        return Layout(root, notes=(taken,))  # a class may be called train
    if not train:
        if wanted == "auto" and others:
            return Layout(root, notes=(f"{_listed(held)}: taken for a class, as there is no training folder",))
        _refuse(root, "there are evaluation folders but no training folder", "add one called train, or point at one")
    if len(train) > 1:
        _refuse(root, f"{' and '.join(train)} could both be the training folder", "keep one")
    chosen = classes[train[0]]
    agreeing = [name for name in held if classes[name] & chosen]
    if wanted == "auto" and (not chosen or (others and not agreeing)):
        _refuse(root, "its folders could be splits or classes", "")
    usable = [name for name in held if bool(classes[name]) == bool(chosen)]
    notes = [f"splits: {printable(train[0])} for training, {printable(usable[0])} for evaluation" if usable else ""]
    flat = [name for name in held if name not in usable]
    if flat:
        notes.append(f"{_listed(flat)} has no class folders: not read")
    if not usable:
        notes.append(f"splits: evaluation images are held out of {printable(train[0])}")
    unread = [*usable[1:], *others]
    if unread:
        notes.append(f"not read, beside the splits: {_listed(unread)}")
    where = os.path.join(root, usable[0]) if usable else None
    return Layout(os.path.join(root, train[0]), where, tuple(note for note in notes if note))


def refuse_one_level_too_high(
    root: str, base: str, names: Sequence[str], items: Sequence[tuple[str, int, int]], wanted: str
) -> list[str]:
    """Return what is merged into classes; `items` are (path below root, class id, size).

    Raises:
        DataError: the class folders hold folders alone, which look like the classes themselves.
    """
    depth = len(os.path.relpath(base, root).split(os.sep)) if base != root else 0
    folders: dict[int, set[tuple[str, ...]]] = {}
    for path, label, _ in items:
        if path.count(os.sep) <= depth + 1 and () in folders.get(label, ()):
            continue  # nearly all of a million
        folders.setdefault(label, set()).add(tuple(path.split(os.sep)[depth + 1 : -1]))
    nested: dict[int, list[str]] = {}
    for label, found in folders.items():
        levels = zip(*found, strict=False)
        wrapped = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))  # 2023/images/CLASS
        if all(len(inside) > wrapped for inside in found):
            nested[label] = sorted({inside[wrapped] for inside in found})
    times = Counter(name for found in nested.values() for name in found)
    repeated = sorted(name for name, count in times.items() if count > 1)
    alone = len(names) == 1 and 0 in nested
    if wanted == "auto" and (alone or len(repeated) > 1):
        found = nested[0] if alone else repeated
        raise DataError(
            f"{printable(base)} looks one level too high: its {len(names)} folders ({_listed(names)}) hold no images "
            f"but folders ({_listed(found)}). Point config.data.source at the folder that holds the classes, "
            "or merge them with --config.data.layout=classes"
        )
    merged = {names[label]: sorted({path[0] for path in found if path}) for label, found in folders.items()}
    merged = {name: found for name, found in merged.items() if found}
    if not merged:
        return []
    first = next(iter(merged))
    return [
        f"sub-folders of {len(merged)} classes belong to their class, such as {printable(first)}: "
        f"{_listed(merged[first])}"
    ]


def _named(folders: dict[str, str], words: Sequence[str]) -> list[str]:
    return [name for word in words for name in folders if word in (name.lower(), _AROUND.sub("", name.lower()))]


def _refuse(root: str, what: str, way: str) -> Never:
    lines = []
    for folder in sub_folders(root)[:12]:
        inside = sub_folders(folder)
        lines.append(f"  {printable(os.path.basename(folder))}/ with {len(inside)} folders {_listed(inside)}".rstrip())
    raise DataError(
        f"{printable(root)}: {what}. Found:\n" + "\n".join(lines) + "\nExpected train/CLASS/… with val/CLASS/…, or "
        f"CLASS/…; {way + '. ' if way else ''}"
        "--config.data.layout=classes takes every folder for a class, =splits for a split"
    )


def _listed(paths: Sequence[str]) -> str:
    names = [printable(os.path.basename(path)) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
