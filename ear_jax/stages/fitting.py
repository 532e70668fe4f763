"""One array of another model made to fit: rows of the same classes, rows of the same scales, inputs with one more."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ear_jax.config import kinds
from ear_jax.config.schema import Config

Masked = np.ma.MaskedArray[Any, Any]

ENCODER = "encoder/"
"""Where the arrays lie that make a tokenizer's latents."""


def rows_of_classes(
    array: np.ndarray, shape: tuple[int, ...], there: Sequence[str], here: Sequence[str]
) -> Masked | None:
    """Return an array with a row a class in the order `here`, masked where `there` lacks one; None to compare shapes.

    Rows behind those of the classes, such as that of images without one, stay behind them.
    """
    behind = shape[0] - len(here)
    if not there or behind < 0 or array.shape != (len(there) + behind, *shape[1:]):
        return None
    found = {name: number for number, name in enumerate(there)}
    if len(there) == len(here) and not found.keys() & set(here):
        return None  # other names for all of them: by number
    numbers = [*(found.get(name, -1) for name in here), *range(len(there), len(there) + behind)]
    return _rows(array, numbers)


def _rows(array: np.ndarray, numbers: Sequence[int]) -> Masked:
    mask = np.zeros((len(numbers), *array.shape[1:]), bool)
    mask[[number < 0 for number in numbers]] = True
    return np.ma.masked_array(array[numbers], mask)


@dataclasses.dataclass(frozen=True)
class LevelRows:
    """Which rows of one model's tables are those of another's levels: the ones of a grid of the same side.

    Attributes:
        here: configuration of the model to be trained.
        there: configuration of the other one.
    """

    here: Config
    there: Config

    @property
    def grids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sides of the grids of all levels, here and there."""
        ours, theirs = (tuple(level.grid for level in kinds.levels(config)) for config in (self.here, self.there))
        return ours, theirs

    @property
    def names(self) -> frozenset[str]:
        """The tables that have rows for each level; empty where both models have the same levels."""
        same = len(set(self.grids)) == 1
        return frozenset() if same else frozenset(kinds.kind_of(self.here).level_rows)

    def of(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> Masked | None:
        """Return a table's rows for the levels here, masked where there is no such grid; None to compare shapes."""
        count = kinds.kind_of(self.here).level_rows[name]
        numbers: list[int] = []
        rows, start = {}, 0
        for level in kinds.levels(self.there):
            many = count(self.there, level)
            rows.setdefault(level.grid, range(start, start + many))
            start += many
        for level in kinds.levels(self.here):
            many = count(self.here, level)
            own = rows.get(level.grid, range(0))
            numbers += own if len(own) == many else [-1] * many
        if start != len(array) or array.shape[1:] != shape[1:] or len(numbers) != shape[0]:
            return None
        return _rows(array, numbers)

    def said(self) -> str:
        """Return which grids are taken from which."""
        ours, theirs = self.grids
        shared = [side for side in ours if side in theirs]
        return f"grids {_listed(shared)} of its {_listed(theirs)}" if shared else "no grid in common"

    def missing(self) -> str:
        """Return the grids here that are not there."""
        ours, theirs = self.grids
        return _listed([side for side in ours if side not in theirs])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def same_latents(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> bool:
    """Tell whether two tokenizers make the same latents, up to their scale: their encoders are equal."""
    names = {name for name in (*ours, *theirs) if name.startswith(ENCODER)}
    return bool(names) and all(
        name in ours and name in theirs and np.array_equal(ours[name], theirs[name]) for name in names
    )


def inputs_of(
    kernel: np.ndarray, bias: np.ndarray, channels: int, tokenizer: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel [channels, E] and bias [E] that do to a tokenizer's tokens what the given ones do to its latents.

    Tokens are latents at unit scale; further channels have no effect.
    """
    mean, std = (tokenizer[f"latent_{name}"].astype(np.float32) for name in ("mean", "std"))
    more = np.zeros((channels - len(kernel), kernel.shape[1]), kernel.dtype)
    return np.concatenate([kernel * std[:, None], more]), bias + mean @ kernel
