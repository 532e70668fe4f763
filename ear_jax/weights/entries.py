"""The vocabulary of conversion: entries that say which foreign arrays are which of ours, in both directions.

A family (`ear.py`, `var.py` …) is a list of entries. An entry is a bijection between a few foreign arrays and a few of
ours, so one list serves reading and writing, and a round trip changes no bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ear_jax.errors import DataError

Arrays = Mapping[str, np.ndarray]
Move = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Foreign arrays and ours that hold the same numbers.

    `to_ours` takes the arrays of `theirs` in order and returns those of `ours`; `to_theirs` undoes it. An entry without
    `ours` is a constant of the foreign format (a mask, a table): it is dropped on reading and made again on writing;
    with `is_optional` it may be absent. Where `is_left_out` it holds weights that our model has no part for: dropped
    all the same, and never made up.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Move
    to_theirs: Move
    is_optional: bool = False
    is_left_out: bool = False


def same(theirs: str, ours: str) -> Entry:
    """Match two arrays of one layout: biases, norms, tables."""
    return Entry((theirs,), (ours,), _identity, _identity)


def reshaped(theirs: str, ours: str, their_shape: Sequence[int], our_shape: Sequence[int]) -> Entry:
    """Match two arrays that differ in axes of length one or in how axes are grouped."""
    return Entry((theirs,), (ours,), _each(_reshape(our_shape)), _each(_reshape(their_shape)))


def matrix(theirs: str, ours: str) -> Entry:
    """Match a dense layer's [out, in] weight with our [in, out] kernel."""
    return Entry((theirs,), (ours,), _each(_transpose(1, 0)), _each(_transpose(1, 0)))


def kernel(theirs: str, ours: str) -> Entry:
    """Match a convolution's OIHW weight with our HWIO kernel."""
    return Entry((theirs,), (ours,), _each(_transpose(2, 3, 1, 0)), _each(_transpose(3, 2, 0, 1)))


def pointwise(theirs: str, ours: str) -> Entry:
    """Match a dense layer's [out, in] weight with our 1x1 convolution kernel [1, 1, in, out]."""
    return Entry((theirs,), (ours,), _each(lambda a: a.T[None, None]), _each(lambda a: a[0, 0].T))


def linear(theirs: str, ours: str) -> tuple[Entry, Entry]:
    """Match a dense layer with bias: `theirs.weight`, `theirs.bias` with `ours/kernel`, `ours/bias`."""
    return matrix(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def convolution(theirs: str, ours: str) -> tuple[Entry, Entry]:
    """Match a convolution with bias: `theirs.weight`, `theirs.bias` with `ours/kernel`, `ours/bias`."""
    return kernel(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> tuple[Entry, Entry]:
    """Match an affine normalisation: `theirs.weight`, `theirs.bias` with `ours/scale`, `ours/bias`."""
    return same(f"{theirs}.weight", f"{ours}/scale"), same(f"{theirs}.bias", f"{ours}/bias")


def stacked(layers: Sequence[Iterable[Entry]]) -> tuple[Entry, ...]:
    """Join equal lists of entries, one list a layer, into entries whose arrays of ours are stacked on axis 0.

    The lists differ in their foreign names only; ours are the same in each.

    Raises:
        ValueError: the lists do not name the same arrays of ours in the same order.
    """
    lists = [list(layer) for layer in layers]
    if not lists or any([entry.ours for entry in own] != [entry.ours for entry in lists[0]] for own in lists):
        raise ValueError("stacked layers must name the same arrays of ours, in the same order")
    return tuple(_stack([own[index] for own in lists]) for index in range(len(lists[0])))


def constant(theirs: str, make: Callable[[], np.ndarray], *, is_optional: bool = True) -> Entry:
    """Name a foreign array that holds no weights; `make` returns it for writing."""
    return Entry((theirs,), (), lambda arrays: (), lambda arrays: (make(),), is_optional)


def left_out(theirs: str, shape: Sequence[int]) -> Entry:
    """Name a foreign array of weights that our model has no part for; it may be absent."""
    return dataclasses.replace(constant(theirs, lambda: np.broadcast_to(np.float32(0), shape)), is_left_out=True)


def from_elsewhere(ours: str, arrays: Mapping[str, np.ndarray]) -> Entry:
    """Name an array of ours that the foreign format leaves out; `arrays` has it under the same name."""
    return Entry((), (ours,), lambda _: (arrays[ours],), lambda _: ())


def converted(theirs: Arrays, entries: Iterable[Entry], file: object, expected: str) -> dict[str, np.ndarray]:
    """Return our arrays of a whole file's; raises DataError, naming what was expected, where one is missing."""
    arrays: dict[str, np.ndarray] = {}
    for entry in entries:
        missing = [name for name in entry.theirs if name not in theirs]
        if missing and not entry.is_optional:
            raise DataError(f"{file} lacks {missing[0]!r}; expected {expected}")
        if not missing:
            arrays.update(zip(entry.ours, entry.to_ours([theirs[name] for name in entry.theirs]), strict=True))
    return arrays


def _stack(entries: Sequence[Entry]) -> Entry:
    width = len(entries[0].theirs)

    def to_ours(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        layers = [entry.to_ours(arrays[index * width : (index + 1) * width]) for index, entry in enumerate(entries)]
        return [_joined(values) for values in zip(*layers, strict=True)]

    def to_theirs(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [
            value
            for index, entry in enumerate(entries)
            for value in entry.to_theirs([array[index] for array in arrays])
        ]

    theirs = tuple(name for entry in entries for name in entry.theirs)
    return Entry(theirs, entries[0].ours, to_ours, to_theirs, entries[0].is_optional)


def _joined(layers: Sequence[np.ndarray]) -> np.ndarray:
    # Left to itself, np.stack keeps the order of transposed layers in memory, and writing would copy all of it again.
    return np.stack(layers, out=np.empty((len(layers), *layers[0].shape), np.result_type(*layers)))


def _identity(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return arrays


def _each(function: Callable[[np.ndarray], np.ndarray]) -> Move:
    return lambda arrays: [function(array) for array in arrays]


def _transpose(*axes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.transpose(axes)


def _reshape(shape: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array.reshape(tuple(shape))
