"""Whole dictionaries of weights moved by a family's entries: all names and shapes are compared first, then arrays are
made one entry at a time, when they are asked for.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from mmap import mmap
from typing import Any

import numpy as np

from ear_jax.errors import ConfigError, DataError
from ear_jax.weights.entries import Entry
from ear_jax.weights.mapped import forget_pages

Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype by name."""

_SHOWN = 10
_FLOATING = "fV"  # numpy calls bfloat16 and its like void


class Moved(Mapping[str, np.ndarray]):
    """Arrays by name, in the order of their entries, of which only those of one entry are in memory at a time."""

    def __init__(self, source: Mapping[str, np.ndarray], entries: Sequence[Entry], to_ours: bool, shapes: Shapes):
        self._source, self._shapes, self._to_ours = source, shapes, to_ours
        self._entries = {name: entry for entry in entries for name in (entry.ours if to_ours else entry.theirs)}
        self._made: tuple[Entry | None, dict[str, np.ndarray]] = (None, {})

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if self._made[0] is not entry:
            self._forget()  # before the next is made
            self._made = (entry, self._make(entry))
        return self._made[1][name]

    def _forget(self) -> None:
        entry, self._made = self._made[0], (None, {})
        sources = () if entry is None else entry.theirs if self._to_ours else entry.ours
        for file in {id(base): base for base in (self._source[name].base for name in sources)}.values():
            if isinstance(file, mmap):
                forget_pages(file)

    def _make(self, entry: Entry) -> dict[str, np.ndarray]:
        names, sources, move = entry.theirs, entry.ours, entry.to_theirs
        if self._to_ours:
            names, sources, move = sources, names, entry.to_ours
        made = dict(zip(names, move([self._source[source] for source in sources]), strict=True))
        return {name: self._fitted(name, array) for name, array in made.items()}

    def _fitted(self, name: str, array: np.ndarray) -> np.ndarray:
        if name not in self._shapes:
            return array
        shape, dtype = self._shapes[name]
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: its entry makes {array.shape}, the model has {tuple(shape)}")
        return array if array.dtype == dtype else array.astype(dtype)


def ours_of(
    theirs: Mapping[str, np.ndarray], entries: Sequence[Entry], expected: Shapes, *, where: str = "the file"
) -> Moved:
    """Return our arrays for foreign ones, made when asked for; floating-point values become the expected dtype.

    Args:
        theirs: Foreign arrays by name.
        entries: The family's entries.
        expected: Shape and dtype of every array of the model that is to hold them.
        where: What the arrays are of, for messages.

    Raises:
        DataError: foreign arrays are missing, left over, or of another shape or kind; the first ten are listed.
        ValueError: the entries do not make exactly the expected arrays.
    """
    made = [name for entry in entries for name in entry.ours]
    if sorted(made) != sorted(expected):
        differ = sorted(set(made) ^ set(expected)) or sorted(made)
        raise ValueError(f"the entries and the model differ in {len(differ)} arrays: {', '.join(differ[:_SHOWN])}")
    chosen = [entry for entry in entries if not _is_absent(entry, theirs)]
    faults = _faults(theirs, chosen, entries, expected)
    if faults:
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in faults.items())
        table = [f"{line} ({kind})" for kind, lines in faults.items() for line in lines]
        more = f"\n  and {len(table) - _SHOWN} more" if len(table) > _SHOWN else ""
        raise DataError(
            f"The weights in {where} do not fit the configured model: {counts}, of {len(theirs)} arrays. Nothing was "
            "written. Choose the configuration they were made with, or with config.convert.weights another table of "
            "the file:\n  "
            + "\n  ".join(table[:_SHOWN])
            + more
            + next(filter(None, (behind(name, theirs) for entry in chosen[:_SHOWN] for name in entry.theirs)), "")
        )
    return Moved(theirs, chosen, True, expected)


def behind(name: str, names: Collection[str]) -> str:
    """Return a sentence about what stands in front of a name in a file, or nothing."""
    starts = [other.removesuffix(f".{name}")[:80] for other in names if other.endswith(f".{name}")][:4]
    if not starts:
        return ""
    listed = " or ".join(repr(f"{start}.") for start in starts)
    choices = " or ".join(f"config.convert.weights={start}" for start in starts)
    return f" The file has {name} behind {listed}: take that part of it with {choices}."


def theirs_of(ours: Mapping[str, np.ndarray], entries: Sequence[Entry]) -> Moved:
    """Return the foreign arrays for ours, constants included, made when asked for.

    Raises:
        ConfigError: the model has arrays that the foreign format does not hold, or holds values in them that the format
            takes for granted (latent statistics).
        ValueError: the entries name arrays that the model lacks.
    """
    named = {name for entry in entries for name in entry.ours}
    if not named <= ours.keys():
        raise ValueError(f"the entries name arrays the model lacks: {', '.join(sorted(named - ours.keys())[:_SHOWN])}")
    lost = sorted(ours.keys() - named)
    for entry in entries:
        if not entry.theirs:
            fixed = zip(entry.ours, entry.to_ours([]), strict=True)
            lost += [name for name, value in fixed if not np.array_equal(value.astype(ours[name].dtype), ours[name])]
    if lacking := [name for entry in entries if entry.is_left_out for name in entry.theirs]:
        raise ConfigError(
            f"The published format needs {len(lacking)} arrays that this model has no part for: "
            f"{', '.join(lacking[:_SHOWN])}. Write the model that they were in."
        )
    if lost:
        raise ConfigError(
            f"The published format has no place for {len(lost)} arrays of this model: {', '.join(lost[:_SHOWN])}. Only "
            "models of a published architecture, with its fixed latent statistics, can be written in it."
        )
    return Moved(ours, entries, False, {})


def _is_absent(entry: Entry, theirs: Mapping[str, Any]) -> bool:
    return entry.is_optional and not any(name in theirs for name in entry.theirs)


def _faults(
    theirs: Mapping[str, np.ndarray], chosen: Sequence[Entry], entries: Sequence[Entry], expected: Shapes
) -> dict[str, list[str]]:
    """Return lines about what is wrong, by kind, without moving an array."""
    wanted = _their_shapes(chosen, expected)
    known = {name for entry in entries for name in entry.theirs}
    lines = {
        "missing": [f"{name}: expected {_describe(*wanted[name])}" for name in wanted if name not in theirs],
        "unexpected": [
            f"{name}: found {_describe(a.shape, a.dtype)}" for name, a in theirs.items() if name not in known
        ],
        "of another shape or kind": [
            f"{name}: expected {_describe(*wanted[name])}, found {_describe(array.shape, array.dtype)}"
            for name, array in theirs.items()
            if name in wanted and not _fits(array, *wanted[name])
        ],
    }
    return {kind: found for kind, found in lines.items() if found}


def _their_shapes(entries: Sequence[Entry], expected: Shapes) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shapes of the foreign arrays, by moving stand-ins for ours that take no memory."""
    shapes = {}
    for entry in entries:
        stand_ins = [np.broadcast_to(np.zeros((), expected[name][1]), expected[name][0]) for name in entry.ours]
        moved = entry.to_theirs(stand_ins)
        shapes |= {name: (array.shape, array.dtype) for name, array in zip(entry.theirs, moved, strict=True)}
    return shapes


def _fits(array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> bool:
    kinds = [
        _FLOATING if kind in _FLOATING else "iu" if kind in "iu" else kind for kind in (array.dtype.kind, dtype.kind)
    ]
    return array.shape == tuple(shape) and kinds[0] == kinds[1]


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
