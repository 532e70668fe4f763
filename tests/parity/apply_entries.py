"""Conversion as `--task=convert` does it, for the arrays of a module that exists as shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ear_jax.weights import apply
from ear_jax.weights.entries import Entry


def to_ours(
    entries: Sequence[Entry], theirs: Mapping[str, np.ndarray], shapes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the module's arrays; missing, unexpected and mis-shaped ones are refused."""
    expected = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in shapes.items()}
    return dict(apply.ours_of(theirs, entries, expected))


def to_theirs(entries: Sequence[Entry], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the foreign arrays, constants included."""
    return dict(apply.theirs_of(ours, entries))
